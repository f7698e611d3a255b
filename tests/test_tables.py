"""Photos and captions: tables, folders of pictures, and samples that are held out.

Tables are written by hand, byte for byte, as spreadsheets save them; what is held out is checked from the pictures'
own bytes.
"""

import hashlib
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from tests.samples import assistant, text, user
from util.command_line import UserError
from util.data.lines import DataError
from util.formats.convert import convert
from util.formats.rows import CLASSIFY, DESCRIBE

DESCRIBE_IMAGE = DESCRIBE.format(kind="image")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder with photos/1.png to 3.png, each of another colour; the current folder is another one."""
    (tmp_path / "in" / "photos").mkdir(parents=True)
    for number, colour in enumerate(("red", "green", "blue"), 1):
        draw(tmp_path / "in" / "photos" / f"{number}.png", colour)
    (tmp_path / "current").mkdir()
    monkeypatch.chdir(tmp_path / "current")
    return tmp_path / "in"


def draw(path: Path, colour: str | tuple, size: tuple[int, int] = (56, 56)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def read(path: Path) -> list:
    return json.loads(path.read_text(encoding="utf-8"))


def image(path: str) -> dict:
    return {"type": "image", "image": path}


def sample(path: str, question: str, answer: str) -> dict:
    return {"messages": [user([image(path), text(question)]), assistant(answer)]}


def converted(source: Path, **options) -> tuple[list, str]:
    """The samples that convert makes of a file or folder, and its summary."""
    output = source.parent / "converted.json"
    said = convert([str(source)], str(output), overwrite=True, **options)
    return read(output), said


# ---- tables ----------------------------------------------------------------------------------------------------------

TABLES = {
    # name: (file name, content, [(picture, question or None: the usual one, answer), ...])
    "commas": ("a.csv", "image,caption\nphotos/1.png,A red card.\n", [("1", None, "A red card.")]),
    "semicolons and a byte order mark, as Excel saves them": (
        "a.csv", "\ufeffImage;Caption\r\nphotos/1.png;Red, plainly.\r\nphotos/2.png;Green.\r\n",
        [("1", None, "Red, plainly."), ("2", None, "Green.")],
    ),
    "the delimiter on a line of its own": ("a.csv", "sep=|\nfile name|text\nphotos/1.png|a;b,c", [("1", None, "a;b,c")]),
    "tabs": ("a.tsv", "path\tlabel\nphotos/1.png\tred, dark\n", [("1", CLASSIFY.format(kind="image"), "red, dark")]),
    "line breaks, quotes and delimiters within quotes": (
        "a.csv", 'image,caption\nphotos/1.png,"Red.\n""Quite"", he said,\nred."\nphotos/2.png,Green.\n',
        [("1", None, 'Red.\n"Quite", he said,\nred.'), ("2", None, "Green.")],
    ),
    "white space after the delimiter": ("a.csv", 'image, caption\nphotos/1.png, "Red, dark."\n', [("1", None, "Red, dark.")]),
    "questions, of which one is missing": (
        "a.csv", "answer,photo,question\nRed.,photos/1.png,Which colour?\nGreen.,photos/2.png,\n",
        [("1", "Which colour?", "Red."), ("2", None, "Green.")],
    ),
    "the answer to a question comes before a label": (
        "a.csv", "image,label,question,answer\nphotos/1.png,3,Why?,So.\n", [("1", "Why?", "So.")],
    ),
    "blank lines, and a column without a name": (
        "a.csv", "image,caption,\n\nphotos/1.png,Red.,\n\n\nphotos/3.png,Blue.,\n", [("1", None, "Red."), ("3", None, "Blue.")],
    ),
    "a table that is called .txt": ("captions.txt", "image,caption\nphotos/1.png,Red.", [("1", None, "Red.")]),
    "Chinese": ("a.csv", "image,text\nphotos/1.png,一张红色的卡片。\n", [("1", None, "一张红色的卡片。")]),
    "columns of ms-swift": ("a.csv", "query,response,image\nWhich?,Red.,photos/1.png\n", [("1", "Which?", "Red.")]),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_a_table(name, folder):
    file, content, wanted = TABLES[name]
    (folder / file).write_bytes(content.encode())
    samples, _ = converted(folder / file)
    assert samples == [
        sample(f"photos/{number}.png", question or DESCRIBE_IMAGE, answer) for number, question, answer in wanted
    ]


def test_a_table_in_utf_16(folder):
    """What Excel calls Unicode text."""
    (folder / "a.txt").write_bytes("image\tcaption\r\nphotos/1.png\tRöt.\r\n".encode("utf-16"))
    assert converted(folder / "a.txt")[0] == [sample("photos/1.png", DESCRIBE_IMAGE, "Röt.")]


def test_columns_that_are_named(folder):
    """By whatever name; columns that are not used are counted, and so is what is asked where nothing is."""
    (folder / "a.csv").write_text(
        "Bild,Titel,image,system,wer\nphotos/1.png,Rot.,x.png,S,Was?\nphotos/2.png,Grün.,,,\n"
    )
    names = {"image_column": "Bild", "text_column": "titel", "question_column": "wer"}
    samples, said = converted(folder / "a.csv", question="Und das?", **names)
    assert samples == [sample("photos/1.png", "Was?", "Rot."), sample("photos/2.png", "Und das?", "Grün.")]
    assert f"{folder}/a.csv: image from 'Bild', text from 'Titel', question from 'wer'" in said
    assert "asked in 1 sample: 'Und das?'" in said
    assert "left out, as training does not use it: system (1), image (1)" in said


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("photo_nr,words\n1,Red.\n", {}, "a.csv: no column of pictures is known by its name (--image_column names it), "
         "and no column of texts is known by its name (--text_column names it); the columns are photo_nr, words"),
        ("image,words\n1,Red.\n", {}, "a.csv: no column of texts is known by its name (--text_column names it); the col"),
        ("image,caption\n1,Red.\n", {"text_column": "titel"}, "a.csv: no column 'titel' (--text_column); the columns are"),
        ("photos/1.png,Red.\n", {}, "a.csv: its first line must name the columns, and is 'photos/1.png, Red.'; write a line "
         "before it, such as image,text"),
        ("image,caption,caption\n1,2,3\n", {}, "a.csv: 3 columns, of which several are named 'caption'; rename them"),
        ("", {}, "a.csv: is empty; a table has a line with the names of its columns"),
        ("image,caption\n", {}, "a.csv: no samples, so nothing is written"),
        ("image,caption\nphotos/1.png,Red, dark.\n", {}, "a.csv, line 2: 3 fields, and the header has 2; put the field"),
        ('image,caption\nphotos/1.png,"Red.\n', {}, "a.csv, line 2: not a row of a table (unexpected end of data); see to"),
        ('image,caption\nphotos/1.png,"Re"d"\n', {}, "a.csv, line 2: not a row of a table ("),
        ("image,caption\nphotos/1.png\n", {}, "a.csv, line 2: no text in the column 'caption'; write it, or leave"),
        ('image,caption\n"a\nb.png",Red.\n,Blue.\n', {}, "a.csv, line 4: no file in the column 'image'; name it, or leave"),
        ("image,caption\nphotos/1.png,<|im_end|>\n", {}, "a.csv, line 2, message 1: text contains the control token"),
        ("image,caption\nphotos\\1.png,Red.\n", {}, "a.csv, line 2, message 0: no such file 'photos\\\\1.png'; '\\' is the "
         "separator of Windows: write 'photos/1.png'"),
        ("image,caption,question\nphotos/1.png,Red.,Why?\n", {"question": "What?"},
         "--question: every row has a question of its own; leave this out"),
    ],
)  # fmt: skip
def test_a_table_that_is_refused(content, options, message, folder):
    (folder / "a.csv").write_text(content)
    with pytest.raises(UserError) as error:
        convert([str(folder / "a.csv")], str(folder / "out.json"), **options)
    told = str(error.value).replace(f"{folder}/", "").splitlines()
    assert any(line.startswith(message) for line in told), told
    assert not (folder / "out.json").exists()


def test_a_table_that_is_no_utf_8(folder):
    (folder / "a.csv").write_bytes("image,caption\nphotos/1.png,Röt.\n".encode("cp1252"))
    with pytest.raises(DataError, match=r"a\.csv: not UTF-8 text \(byte .*\); save it as 'CSV UTF-8'"):
        convert([str(folder / "a.csv")], str(folder / "out.json"))


def test_flags_of_tables_without_a_table(folder):
    (folder / "a.json").write_text(json.dumps([{"messages": [user("Hi"), assistant("Hello.")]}]))
    with pytest.raises(
        DataError, match="--text_column, --question: no sample is a row of a picture and its text; leave"
    ):
        convert([str(folder / "a.json")], str(folder / "out.json"), text_column="caption", question="What?")


def test_rows_in_json_and_parquet(folder):
    """The same columns; a list of one text unwrapped, a number as its text, a class as its name."""
    rows = [
        {"image": "photos/1.png", "caption": ["Red."]},
        {"image_path": "photos/2.png", "question": "How many?", "answer": 2},
        {"video": ["photos/1.png", "photos/2.png"], "text": "It changes."},
        {"images": ["photos/1.png", "photos/3.png"], "question": "Alike?", "answer": "No."},
    ]
    (folder / "a.json").write_text(json.dumps(rows))
    samples, said = converted(folder / "a.json")
    frames = {"type": "video", "video": ["photos/1.png", "photos/2.png"]}
    assert samples == [
        sample("photos/1.png", DESCRIBE_IMAGE, "Red."),
        sample("photos/2.png", "How many?", "2"),
        {"messages": [user([frames, text(DESCRIBE.format(kind="video"))]), assistant("It changes.")]},
        {"messages": [user([image("photos/1.png"), image("photos/3.png"), text("Alike?")]), assistant("No.")]},
    ]
    assert "asked in 1 sample: 'Describe the video.'" in said
    (folder / "b.json").write_text(json.dumps([{"image": "photos/1.png", "caption": ["Red.", "A card."]}]))
    with pytest.raises(DataError, match="sample 0: the column 'caption' holds 2 texts; write a row for each"):
        convert([str(folder / "b.json")], str(folder / "out.json"))

    datasets = pytest.importorskip("datasets")
    content = (folder / "photos" / "3.png").read_bytes()
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["red", "blue"]))
    table = datasets.Dataset.from_list([{"image": {"bytes": content, "path": None}, "label": 1}], features=features)
    table.to_parquet(str(folder / "a.parquet"))
    table.save_to_disk(str(folder / "saved"))
    for source in (folder / "a.parquet", folder / "saved"):
        ((question, answer),) = [each["messages"] for each in converted(source)[0]]
        assert (folder / question["content"][0]["image"]).read_bytes() == content
        assert question["content"][1] == text(CLASSIFY.format(kind="image"))
        assert answer == assistant("blue")


# ---- folders ---------------------------------------------------------------------------------------------------------


def test_a_folder_with_captions(folder):
    photos = folder / "photos"
    draw(photos / "10.JPG", "black")
    draw(photos / "deep" / "4.webp", "white")
    draw(photos / ".hidden" / "5.png", "white")
    (photos / "._1.png").write_bytes(b"what macOS leaves")
    (photos / "1.txt").write_text("\ufeffRed.\n", encoding="utf-8")
    (photos / "2.json").write_text(json.dumps({"question": "Which?", "answer": "Green."}))
    (photos / "3.json").write_text(json.dumps(["Blue.", "A blue card."]))
    (photos / "10.JPG.txt").write_text("Black.")
    (photos / "deep" / "4.txt").write_text("White,\nall over.\n")
    (photos / "README.txt").write_text("My photos.")
    samples, said = converted(photos)
    assert samples == [
        sample("photos/1.png", DESCRIBE_IMAGE, "Red."),
        sample("photos/2.png", "Which?", "Green."),
        sample("photos/3.png", DESCRIBE_IMAGE, "Blue."),
        sample("photos/3.png", DESCRIBE_IMAGE, "A blue card."),
        sample("photos/10.JPG", DESCRIBE_IMAGE, "Black."),
        sample("photos/deep/4.webp", DESCRIBE_IMAGE, "White,\nall over."),
    ]
    assert f"{photos}: passed over, as no picture has its name: README.txt (1 of text in all)" in said
    (photos / "2.json").unlink()
    (photos / "3.txt").write_text("Blue?")
    (photos / "1.jpg").write_bytes((photos / "10.JPG").read_bytes())
    (photos / "10.JPG.txt").write_text(" ")
    with pytest.raises(DataError) as error:
        convert([str(photos)], str(folder / "out.json"))
    assert str(error.value).replace(f"{photos}/", "").splitlines() == [
        "1.jpg: 1.txt is beside 2 pictures of this name; rename all but one",
        "1.png: 1.txt is beside 2 pictures of this name; rename all but one",
        "2.png: no text beside it; write its caption into 2.txt",
        "3.png: several texts beside it, 3.txt and 3.json; keep one",
        "10.JPG.txt: no text in the column 'caption'; write it, or leave the row out",
        "5 of 6 samples cannot be converted, so nothing is written; --skip_bad leaves them out",
    ]


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_a_folder_with_metadata(name, folder):
    """The imagefolder of Hugging Face `datasets`."""
    table = "file_name,text,id\n1.png,Red.,7\n3.png,Blue.,8\n"
    lines = [{"file_name": "1.png", "text": "Red.", "id": 7}, {"file_name": "3.png", "text": "Blue.", "id": 8}]
    content = table if name.endswith(".csv") else "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "photos" / name).write_text(content)
    wanted = [sample("photos/1.png", DESCRIBE_IMAGE, "Red."), sample("photos/3.png", DESCRIBE_IMAGE, "Blue.")]
    for source in (folder / "photos", folder / "photos" / name):
        convert([str(source)], str(folder / "out.json"), overwrite=True)
        assert read(folder / "out.json") == wanted
    (folder / "photos" / "metadata.parquet").write_bytes(b"")
    with pytest.raises(DataError, match=rf"photos: holds {re.escape(name)} and metadata\.parquet; name one of them"):
        convert([str(folder / "photos")], str(folder / "none.json"))


def test_a_folder_for_each_class(folder):
    for name, colour in (("cat/2.png", "red"), ("cat/10.png", "red"), ("sea lion/1.png", "blue")):
        draw(folder / "animals" / name, colour)
    samples, said = converted(folder / "animals")
    question = CLASSIFY.format(kind="image")
    assert samples == [
        sample("animals/cat/2.png", question, "cat"),
        sample("animals/cat/10.png", question, "cat"),
        sample("animals/sea lion/1.png", question, "sea lion"),
    ]
    assert f"{folder}/animals: 2 folders as classes: cat 2, sea lion 1" in said
    assert f"asked in 3 samples: {question!r}" in said
    samples, said = converted(folder / "animals", question="Which animal is it?")
    assert samples[2] == sample("animals/sea lion/1.png", "Which animal is it?", "sea lion")

    draw(folder / "animals" / "3.png", "red")
    draw(folder / "animals" / "cat" / "young" / "4.png", "red")
    with pytest.raises(DataError) as error:
        convert([str(folder / "animals")], str(folder / "out.json"))
    assert str(error.value).replace(f"{folder}/animals/", "").splitlines()[:2] == [
        "3.png: lies beside the folders of the classes; put it into the folder of its class",
        "cat/young/4.png: lies 2 folders deep; name the folder that the folders of the classes lie in",
    ]
    draw(folder / "split" / "train" / "cat" / "1.png", "red")
    draw(folder / "split" / "test" / "cat" / "2.png", "red")
    with pytest.raises(DataError, match=r"split: holds the splits test, train; name one, such as .*split/test"):
        convert([str(folder / "split")], str(folder / "out.json"))
    with pytest.raises(
        DataError, match=r"photos: 3 pictures and no text that belongs to one; write the caption of 1\.png"
    ):
        convert([str(folder / "photos")], str(folder / "out.json"))


def test_a_folder_of_frames_is_a_video(folder, processor):
    """Its images in natural order, in training as in convert; the folder stays one path."""
    from util.dataset import load_examples

    for number in (1, 2, 10):
        draw(folder / "clip" / f"frame_{number}.png", (number * 20, 0, 0))
    (folder / "clip" / "notes.txt").write_text("no image")
    (folder / "clip" / "._frame_1.png").write_bytes(b"what macOS leaves")
    for value in ("clip", "clip/", ["clip"]):
        row = {"messages": [user([{"type": "video", "video": value, "fps": 1}, text("What?")]), assistant("Red.")]}
        (folder / "a.json").write_text(json.dumps([row]))
        samples, _ = converted(folder / "a.json")
        assert samples[0]["messages"][0]["content"][0]["video"] in ("clip", ["clip"])
        for name in ("a.json", "converted.json"):
            (example,) = load_examples([str(folder / name)], processor)
            paths = example.media[0]["video"]
            assert [Path(path).name for path in paths] == ["frame_1.png", "frame_2.png", "frame_10.png"]
            # Beside a list convert drops it, and of a folder training does.
            assert example.unused == ({"content[].fps"} if name == "a.json" or isinstance(value, str) else set())
    draw(folder / "clip" / "frame_3.png", "red", (56, 112))
    with pytest.raises(
        DataError, match=r"message 0: .*clip/frame_3\.png: 56x112 pixels, and the first frame of its video"
    ):
        converted(folder / "a.json")


def test_a_frame_that_is_added_is_seen_by_the_sizes_that_are_kept(folder, processor):
    import os

    from util.cost.kept_sizes import media_files, state_of
    from util.dataset import load_examples

    draw(folder / "clip" / "1.png", "red")
    row = {"messages": [user([{"type": "video", "video": "clip"}, text("What?")]), assistant("Red.")]}
    (folder / "a.json").write_text(json.dumps([row]))
    (example,) = load_examples([str(folder / "a.json")], processor)
    files = media_files(example, folder)
    os.utime(folder / "clip", (0, 0))  # so that the clock's resolution does not matter
    before = state_of(files)
    assert before == state_of(files)
    draw(folder / "clip" / "2.png", "red")
    assert before != state_of(files)


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_in_another_form_of_unicode(forms, folder, processor):
    """A file named on macOS and a table written elsewhere, or the other way round."""
    from unicodedata import normalize

    from util.dataset import load_examples

    in_file, on_disk = forms
    draw(folder / normalize(on_disk, "fotos/Müñchén 가.png"), "red")
    name = normalize(in_file, "fotos/Müñchén 가.png")
    assert name != normalize(on_disk, name)
    (folder / "a.json").write_text(json.dumps([sample(name, "What?", "Red.")]))
    (folder / "a.csv").write_text(f"image,question,answer\n{name},What?,Red.\n", encoding="utf-8")
    (example,) = load_examples([str(folder / "a.json")], processor)
    assert Path(example.media[0]["image"]).is_file()
    for source in ("a.json", "a.csv"):
        samples, said = converted(folder / source)
        assert "not found" not in said
        assert (folder / samples[0]["messages"][0]["content"][0]["image"]).is_file()


# ---- held out --------------------------------------------------------------------------------------------------------


def contents(samples: list, folder: Path) -> set[str]:
    """Hashes of all pictures that samples show, read from the files."""
    found = set()
    for each in samples:
        for item in each["messages"][0]["content"]:
            if isinstance(item, dict) and "image" in item:
                found.add(hashlib.md5((folder / item["image"]).read_bytes()).hexdigest())
    return found


def table_of_copies(folder: Path) -> Path:
    """60 rows of 30 pictures; half of them are copies of others under another name, and some are links."""
    rows = ["image,question,answer"]
    for number in range(60):
        path = folder / "many" / f"{number}.png"
        draw(path, (number % 15 * 10, 100, 200))
        if number % 20 == 19:
            path.unlink()
            path.symlink_to(folder / "many" / "0.png")
        rows.append(f"many/{number}.png,What is {number}?,It is {number}.")
        if number % 2:
            rows.append(f"./many/../many/{number}.png,Again: {number}?,{number}.")
    (folder / "a.csv").write_text("\n".join(rows))
    return folder / "a.csv"


def test_what_is_held_out_shares_no_picture(folder):
    source = table_of_copies(folder)
    output = folder / "train.json"
    said = convert([str(source)], str(output), hold_out=0.2)
    train, held_out = read(output), read(folder / "train_held_out.json")
    assert len(train) + len(held_out) == 90
    assert len({json.dumps(each) for each in [*train, *held_out]}) == 90
    assert 0.1 * 90 <= len(held_out) <= 0.2 * 90
    assert not contents(train, folder) & contents(held_out, folder)
    assert len(contents(train, folder) | contents(held_out, folder)) == 15
    assert f"held out {len(held_out)} of 90 samples" in said
    assert f"train: python finetune.py --data {output} --eval_data {folder}/train_held_out.json" in said

    convert([str(source)], str(folder / "again.jsonl"), hold_out=0.2)
    again = (folder / "again_held_out.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in again] == held_out, "the seed decides"
    others = []
    for seed in range(1, 4):
        convert([str(source)], str(output), hold_out=0.2, seed=seed, overwrite=True)
        others.append(read(folder / "train_held_out.json"))
    assert any(other != held_out for other in others)


def test_what_is_held_out_repeats_no_conversation(folder):
    """Of text alone: white space, case and the way it is written make no other conversation."""
    rows = []
    for number in range(20):
        rows.append({"messages": [user(f"What is {number}?"), assistant("A number.")]})
        rows.append({"messages": [user([text(f"what is  {number}?\n")]), assistant("a number.")]})
    (folder / "a.json").write_text(json.dumps(rows))
    convert([str(folder / "a.json")], str(folder / "train.json"), hold_out=0.3)
    asked = []
    for name in ("train.json", "train_held_out.json"):
        asked.append({re.search(r"\d+", str(each["messages"][0]["content"]))[0] for each in read(folder / name)})
    assert not asked[0] & asked[1]
    assert (len(asked[0]), len(asked[1])) == (14, 6)


def test_a_picture_in_the_file_is_that_on_the_disk(folder):
    import base64

    data = "data:image/png;base64," + base64.b64encode((folder / "photos" / "1.png").read_bytes()).decode()
    rows = [sample("photos/1.png", "A?", "Red."), sample(data, "B?", "Red."), sample("photos/2.png", "C?", "Green.")]
    (folder / "a.json").write_text(json.dumps(rows))
    for seed in range(6):
        convert([str(folder / "a.json")], str(folder / "train.json"), hold_out=0.4, seed=seed, overwrite=True)
        sides = [len(read(folder / name)) for name in ("train.json", "train_held_out.json")]
        assert sides == [2, 1], "the picture of two samples stays on one side"


@pytest.mark.parametrize(
    ("options", "rows", "message"),
    [
        ({"hold_out": 1.0}, 3, r"--hold_out 1\.0: the share to hold out is above 0 and below 1, such as 0\.1"),
        ({"hold_out": 0.0}, 3, r"--hold_out 0\.0: the share to hold out is above 0 and below 1"),
        (
            {"hold_out": 0.1},
            1,
            "--hold_out: all samples share a picture, or there is one alone, so none can be held out",
        ),
    ],
)
def test_what_cannot_be_held_out(options, rows, message, folder):
    table = [f"photos/{number + 1}.png,A card." for number in range(rows)]
    (folder / "a.csv").write_text("\n".join(["image,caption", *table]))
    with pytest.raises(UserError, match=message):
        convert([str(folder / "a.csv")], str(folder / "out.json"), **options)
    assert not list(folder.glob("*out*"))


def test_at_least_one_is_held_out_and_nothing_is_lost(folder):
    (folder / "a.csv").write_text("image,caption\nphotos/1.png,Red.\nphotos/2.png,Green.\nphotos/3.png,Blue.\n")
    (folder / "out_held_out.json").write_text("mine")
    with pytest.raises(UserError, match=r"out_held_out\.json: exists"):
        convert([str(folder / "a.csv")], str(folder / "out.json"), hold_out=0.01)
    assert (folder / "out_held_out.json").read_text() == "mine"
    convert([str(folder / "a.csv")], str(folder / "out.json"), hold_out=0.01, overwrite=True)
    assert (len(read(folder / "out.json")), len(read(folder / "out_held_out.json"))) == (2, 1)
    convert([str(folder / "a.csv")], str(folder / "out.json"), hold_out=0.99, overwrite=True)
    assert (len(read(folder / "out.json")), len(read(folder / "out_held_out.json"))) == (1, 2)
