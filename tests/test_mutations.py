"""Broken data files and media from a seed: each trains, or is refused in one message that names file and sample.

The short form takes a minute; `./run_tests.sh --slow` judges 1,000 data files (20 of them also through the command
line) and 300 media. Most data files train a stand-in with one weight: the script runs as it is, only the model, its
saving and loss.png are replaced; every 20th trains the real model. `tests/mutations.py` says how a seed is replayed.
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from qwen_vl_utils.vision_process import to_rgb

from tests import mutations
from tests.mutations import BIG, assistant, user
from util import vision
from util.data import entries
from util.data.lines import shortened, split_weight
from util.data.video_reader import MOST_PIXELS, VideoError, VideoReader
from util.dataset import DataError, Samples, load_examples
from util.vision import Budget

SHORT, LONG = range(150), range(10_000, 11_000)
SHORT_MEDIA, LONG_MEDIA = range(60), range(10_000, 10_300)


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mutations") / "media"
    mutations.make_media(folder)
    return folder


@pytest.fixture
def judge(media, tiny_path, tmp_path):
    """A function (kind, seeds) -> Report; a failure shows the seeds, what they are and what went wrong."""

    def run(kind: str, seeds) -> mutations.Report:
        report = mutations.judge_all(kind, list(seeds), str(tiny_path), str(media), str(tmp_path))
        print(f"{len(seeds)} of {kind}: {report}")
        assert not report.failures, "\n\n".join(report.failures)
        assert sum(report.outcomes.values()) == len(seeds)
        return report

    return run


def check_data(report: mutations.Report, count: int) -> None:
    assert report.outcomes["refused"] > count / 4
    assert report.outcomes["trained"] > count / 10


def check_media(report: mutations.Report, count: int) -> None:
    for outcome in ("read", "refused by its header", "refused by its pixels"):
        assert report.outcomes[outcome] > count / 30, outcome


def through_the_command_line(seeds, media: Path, model: Path, folder: Path) -> None:
    def judge(seed: int) -> str:
        case = mutations.data_case(seed, media, folder / f"line{seed}")
        try:
            outcome = mutations.run_command_line(case, folder / f"line{seed}" / "run", str(model))
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {'; '.join(case.description)}") from error
        return f"seed {seed}, {outcome}: {'; '.join(case.description)}"

    with ThreadPoolExecutor(2) as pool:
        print(*pool.map(judge, seeds), sep="\n")


def test_data_files(judge):
    check_data(judge("data", SHORT), len(SHORT))


def test_media_files(judge):
    check_media(judge("media", SHORT_MEDIA), len(SHORT_MEDIA))


def test_data_files_through_the_command_line(media, tiny_path, tmp_path):
    through_the_command_line((0, 9, 13), media, tiny_path, tmp_path)


@pytest.mark.slow
def test_a_thousand_data_files(judge):
    check_data(judge("data", LONG), len(LONG))


@pytest.mark.slow
def test_three_hundred_media_files(judge):
    check_media(judge("media", LONG_MEDIA), len(LONG_MEDIA))


@pytest.mark.slow
def test_twenty_data_files_through_the_command_line(media, tiny_path, tmp_path):
    through_the_command_line(LONG[::50], media, tiny_path, tmp_path)


def test_a_seed_is_always_the_same_file(media, tmp_path):
    for seed in range(40):
        for kind in (mutations.data_case, mutations.media_case):
            folder = tmp_path / f"{kind.__name__}{seed}"
            cases, contents = [], []
            for _ in range(2):
                cases.append(kind(seed, media, folder))
                files = [path for path in sorted(folder.iterdir()) if path.is_file()]
                contents.append([(path.name, path.read_bytes()) for path in files])
                folder.rename(tmp_path / f"{folder.name} {len(cases)}")
            assert cases[0] == cases[1]
            assert contents[0] == contents[1]


def test_a_worker_that_ends_or_hangs_is_a_failure(media, tiny_path, tmp_path, monkeypatch):
    """The judge itself: a seed that cannot be made fails with its number, the next goes on in the same or a new process."""
    worker = mutations.Worker(str(tiny_path), str(media), str(tmp_path))
    wrong = worker.judge("no such kind", 3)[-1]
    assert "KeyError" in wrong
    assert worker.judge("media", 0)[-1] is None
    worker.process.kill()
    worker.process.join()
    assert worker.judge("media", 1)[-1] is None, "a new process"
    os.kill(worker.process.pid, 19)  # SIGSTOP
    monkeypatch.setattr(mutations, "MOST_WAITED", 0.5)
    assert "hangs" in worker.judge("media", 2)[-1]
    worker.stop()


# ---- what the mutations found ----------------------------------------------------------------------------------------


def samples_of(folder: Path, processor, *messages, budget: Budget | None = None) -> Samples:
    file = folder / "data.json"
    file.write_text(json.dumps([{"messages": list(messages)}]))
    return Samples(load_examples([str(file)], processor), processor, budget or Budget())


def test_a_text_far_too_long_is_refused_before_the_tokenizer_gives_up(processor, tmp_path):
    """10 MB of spaces end Qwen2-VL's tokenizer (a panic), 10 MB of words take 2 GB."""
    with pytest.raises(DataError, match=r"data\.json, sample 0: 10,000,\d{3} characters of text, above 1,000,000"):
        samples_of(tmp_path, processor, user(" " * BIG), assistant("A wave."))


def test_a_message_stays_short(processor, tmp_path, media):
    for content in ([{"type": "image", "image": "x" * 100_000}],
                    [{"type": "image", "image": str(media / "a.png"), "k" * 100_000: 1}]):  # fmt: skip
        with pytest.raises(DataError) as error:
            samples_of(tmp_path, processor, user(content), assistant("A wave."))
        assert f"{tmp_path}/data.json, sample 0, message 0: " in str(error.value)
        assert len(str(error.value)) < 1000
    assert shortened("a" * 600) == "a" * 600
    assert shortened("a" * 300 + "-" + "b" * 300) == "a" * 300 + " ... " + "b" * 300


@pytest.mark.parametrize("text", [3, "What is it?"])
def test_text_in_the_item_of_an_image_is_refused(text, processor, tmp_path, media):
    """The chat template would leave it out."""
    item = {"type": "image", "image": str(media / "a.png"), "text": text}
    with pytest.raises(DataError, match="sample 0, message 0: unknown key 'text' in an item of type image"):
        samples_of(tmp_path, processor, user([item]), assistant("A wave."))


@pytest.mark.parametrize("weight", ["1001", "1e12", "1e300"])
def test_a_weight_that_no_memory_holds_is_refused(weight):
    with pytest.raises(DataError, match="above 0 and up to 1000"):
        split_weight(f"a.jsonl*{weight}")


@pytest.mark.parametrize("size", [5e-324, 1e-160, 1e-10])
def test_a_size_that_vanishes_is_refused(size, media):
    item = {"type": "image", "image": str(media / "a.png"), "resized_height": size, "resized_width": size}
    with pytest.raises(ValueError, match=r"resized_.* must be above 0"):
        entries.check_keys(item)
    entries.check_keys({**item, "resized_height": 1e-9, "resized_width": 1e-9})
    assert vision.image_size({**item, "resized_height": 1e-9, "resized_width": 1e-9}, 60, 90, Budget()) == (56, 56)


def test_whatever_pillow_raises_names_the_file(media, tmp_path, monkeypatch):
    """A damaged AVIF raises RuntimeError, others struct.error, KeyError and more."""
    path = str(media / "a.png")
    for place in ("getexif", "crop", "convert"):
        with monkeypatch.context() as patch:
            patch.setattr(Image.Image, place, lambda *arguments: {}["what it stumbled on"])
            name = str(media / "a.bmp") if place == "getexif" else str(media / "palette.png")
            with pytest.raises(ValueError, match=r"not a readable image \('what it stumbled on'\)") as error:
                vision.load({"type": "image", "image": name}, Budget())
            assert name in str(error.value)
    assert vision.load({"type": "image", "image": path}, Budget()).grid.t == 1


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "I;16", "transparent"])
def test_an_image_in_strips_is_the_image_as_a_whole(mode, media):
    """600 rows are three strips. The whole is as qwen-vl-utils makes it, but for 16 bits."""
    rows, columns = np.mgrid[:600, :70]
    pixels = np.stack([rows % 256, columns * 3, (rows * columns) % 256, rows // 3], axis=2).astype(np.uint8)
    image = Image.fromarray(pixels, "RGBA")
    if mode.startswith("I"):
        image = Image.fromarray((rows * 100 + columns).astype(np.uint16))
        wanted = np.repeat(((rows * 100 + columns) >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
    elif mode == "transparent":
        image = image.convert("RGB").quantize(16)
        image.info["transparency"] = 3
        wanted = np.asarray(to_rgb(image))
    else:
        image = image.convert("RGB").convert("P") if mode == "P" else image.convert(mode)
        wanted = np.asarray(to_rgb(image))
    assert wanted.std() > 10
    assert np.array_equal(vision.to_tensor(image, "a.png").permute(1, 2, 0), wanted)


def test_a_photo_with_facts_is_a_video_of_one_frame(media, tmp_path):
    """FFmpeg hands its EXIF on as side data that PyAV has no name for; it is upright all the same."""
    pixels = np.zeros((40, 64, 3), np.uint8)
    pixels[:20, :32], pixels[:20, 32:], pixels[20:, :32] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    for orientation, turns in ((1, 0), (3, 2), (6, 3), (8, 1)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif, quality=95)
        reader = VideoReader(tmp_path / "a.jpg")
        (frame,) = reader.frames_at([0])
        assert (reader.height, reader.width) == frame.shape[1:]
        difference = np.rot90(pixels, turns).astype(int) - frame.permute(1, 2, 0).numpy()
        assert abs(difference).mean() < 5


def test_a_video_frame_too_large_is_refused_before_it_is_made(tmp_path):
    path = tmp_path / "large.png"
    path.write_bytes(mutations.bomb_png(9000, 9000, "L"))
    assert MOST_PIXELS < 9000 * 9000
    with pytest.raises(VideoError, match=r"large\.png: frames of 9000x9000 pixels, above 67,108,864"):
        VideoReader(path)
