"""New tokens (`--new_tokens`): the file, the rows, training, and what comes out, against peft and transformers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen2VLForConditionalGeneration

import finetune
from tests import runs
from util.adapters import lora, new_tokens
from util.checkpoint import read_state
from util.collator import Collator
from util.command_line import UserError, run_command
from util.config import Config, parse_arguments
from util.cost import flops, memory
from util.dataset import Samples, Size, load_examples
from util.model import build_model, load_config, load_processor, load_weights
from util.optimizer import build_optimizer
from util.publish.export import export
from util.publish.merge_lora import merge_run
from util.results import show
from util.results.evaluate import Answerer, ask
from util.vision import Budget

# Whether plain transformers opens an adapter with the rows of new tokens (5.17 leaves them out; not tried between)
OPENS_TIED_ROWS = Version(transformers.__version__) >= Version("5.24")
CPU = torch.device("cpu")
MOVES = ["<move_left>", "<move_right>", "<move_up>", "<move_down>"]
MANY = [f"<place_{number}>" for number in range(100)]  # more than the unused rows of tiny
ADAPTERS = {"lora_rank": 4, "lora_vision": True}
# (head and embedding, file of tokens): two of them say most, the others take their time
RUNS = [
    ("tied", "moves"),
    ("untied", "many"),
    pytest.param("tied", "many", marks=pytest.mark.slow),
    pytest.param("untied", "moves", marks=pytest.mark.slow),
]


@pytest.fixture(scope="session")
def needs_peft():
    return pytest.importorskip("peft", reason="adapters need peft (pip install peft)")


@pytest.fixture(scope="module")
def untied_path(tiny_path, tmp_path_factory) -> Path:
    """tiny with a head of its own, as the official 7B has."""
    folder = tmp_path_factory.mktemp("untied") / "model"
    shutil.copytree(tiny_path, folder)
    config = load_config(str(tiny_path))
    config.tie_word_embeddings = False
    config.text_config.tie_word_embeddings = False
    torch.manual_seed(1)
    Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def paths(tiny_path, untied_path) -> dict[str, Path]:
    return {"tied": tiny_path, "untied": untied_path}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """Files of tokens, and `data`: questions whose answers are moves."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "moves").write_text("\n".join(MOVES) + "\n")
    (folder / "many").write_text("\n".join([*MOVES, *MANY]) + "\n")
    samples = []
    for word in ("left", "right", "up", "down"):
        for others in ("left", "up"):
            answer = f"<move_{word}><move_{others}>"
            content = f"Go {word}, then {others}."
            samples.append(
                {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}
            )
    (folder / "data.json").write_text(json.dumps(samples))
    return {"moves": str(folder / "moves"), "many": str(folder / "many"), "data": str(folder / "data.json")}


def settings(model: Path, files: dict, directory: Path, **changes) -> dict:
    own = {"data": [files["data"]], "new_tokens": files["moves"], "max_steps": 4, "learning_rate": 1e-2, "epochs": 99,
           "max_pixels": 28 * 28 * 8}  # fmt: skip
    return runs.settings(model, directory, **{**own, **changes})


def embedding(path: Path) -> torch.Tensor:
    return load_file(path / "model.safetensors")["model.embed_tokens.weight"]


def head(path: Path) -> torch.Tensor:
    """The head's weights; of a tied model the embedding's."""
    return load_file(path / "model.safetensors").get("lm_head.weight", embedding(path))


def text_logits(model, path: Path) -> torch.Tensor:
    """Of a text with new tokens, by transformers' own forward pass."""
    ids = AutoProcessor.from_pretrained(path).tokenizer("Go <move_left>, <move_up>!", return_tensors="pt").input_ids
    assert ids.max() > 544, "a new token is among them"
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


# ---- the file -------------------------------------------------------------------------------------------------------


def test_lines_become_tokens_once(tmp_path):
    """Blank lines, duplicates, Windows' line ends, a byte order mark, and letters in their decomposed form."""
    file = tmp_path / "tokens.txt"
    file.write_bytes("\ufeff<a>\r\n\r\n  \n<b>\n<a>\n<cafe\u0301>\n<caf\u00e9>".encode())
    assert [entry.text for entry in new_tokens.read(str(file))] == ["<a>", "<b>", "<caf\u00e9>"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, ["cannot be read", "No such file"]),
        (b"\xff\xfe<\x00a\x00>\x00", ["it is not UTF-8"]),
        (b"\n \n", ["there is no token in it"]),
        (b"<ok>\n<move left>\n\t<tab>\n", ["line 2: '<move left>' has white space", "line 3: '\\t<tab>' has white space"]),
        (b"<ok>\n<|im_end|>\n<x><|image_pad|>\n", ["line 2: '<|im_end|>' holds the control token '<|im_end|>'",
                                                  "line 3: '<x><|image_pad|>' holds the control token"]),
        (b"<|box_start|>x\n", ["line 1: '<|box_start|>x' is always read as <|box_start|> x"]),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_is_named_and_nothing_is_written(content, said, tmp_path, tiny_path, files, capsys):
    file = tmp_path / "tokens.txt"
    if content is not None:
        file.write_bytes(content)
    config = settings(tiny_path, files, tmp_path / "run", new_tokens=str(file), data=files["data"])
    with pytest.raises(SystemExit) as ended:
        run_command(finetune.train, parse_arguments("test", runs.flags(config)))
    assert ended.value.code == 2
    message = capsys.readouterr().err
    for part in said:
        assert part in message
    assert not (tmp_path / "run").exists()


def test_a_frozen_language_model_has_no_rows_to_train():
    with pytest.raises(UserError, match="--new_tokens and --freeze language_model"):
        Config(new_tokens="tokens.txt", freeze=["language_model"])


# ---- rows -----------------------------------------------------------------------------------------------------------


def test_unused_rows_come_first(tiny_path, files):
    few = new_tokens.of(Config(new_tokens=files["moves"]), str(tiny_path))
    many = new_tokens.of(Config(new_tokens=files["many"]), str(tiny_path))
    assert few.ids == (545, 546, 547, 548), "tiny has 545 tokens and 576 rows"
    assert few.rows == 576
    assert few.in_words() == "4 new tokens: 4 in unused rows"
    assert many.ids == tuple(range(545, 649))
    assert many.rows == 704, "the next multiple of 64 after 649"
    assert many.in_words() == "104 new tokens: 31 in unused rows, 73 in added ones (576 become 704, a multiple of 64)"


def test_the_official_model_has_room_for_279(official_processor, tmp_path):
    """151,936 rows and 151,657 tokens, by its config and tokenizer."""
    folder = official_processor.tokenizer.name_or_path
    for number, rows in ((279, 151_936), (280, 152_000)):
        file = tmp_path / f"{number}.txt"
        file.write_text("\n".join(f"<loc_{index}>" for index in range(number)))
        found = new_tokens.of(Config(new_tokens=str(file)), folder)
        assert found.ids[0] == 151_657
        assert found.rows == rows


@pytest.mark.parametrize("kind", ["tied", "untied"])
@pytest.mark.parametrize("name", ["moves", "many"])
def test_rows_begin_as_the_mean_of_their_pieces(kind, name, paths, files):
    """By hand, from the files of the model; the other rows are bit for bit as they were."""
    path = paths[kind]
    config = Config(model=str(path), new_tokens=files[name], device="cpu", dtype="float32")
    model = build_model(config, str(path), load_processor(str(path), config), CPU).model
    tokenizer = AutoProcessor.from_pretrained(path).tokenizer
    pieces = tokenizer("<move_left>").input_ids
    assert len(pieces) > 3
    for weight, before in ((model.get_input_embeddings().weight, embedding(path)), (model.lm_head.weight, head(path))):
        assert torch.equal(weight[:545], before[:545])
        torch.testing.assert_close(weight[545], before[pieces].mean(0), rtol=1e-6, atol=1e-6)
        if name == "many":
            assert weight.shape == (704, 128)
            torch.testing.assert_close(weight[700], before.mean(0), rtol=1e-5, atol=1e-6)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == (kind == "tied")


def test_what_is_in_the_vocabulary_already_is_said(tiny_path, tmp_path, files):
    """A piece of the vocabulary stays what it is; the tokens of an earlier training keep their rows and are trained."""
    first = tmp_path / "first"
    shutil.copytree(tiny_path, first)
    processor = AutoProcessor.from_pretrained(tiny_path)
    processor.tokenizer.add_tokens(["<move_left>"])
    processor.save_pretrained(first)
    file = tmp_path / "tokens.txt"
    file.write_text("<move_up>\nleft\n<move_left>\n")
    found = new_tokens.of(Config(new_tokens=str(file)), str(first))
    if len(processor.tokenizer("left").input_ids) > 1:
        pytest.fail("choose a word that is one token of tiny")
    assert found.texts == ("<move_left>", "<move_up>")
    assert found.ids == (545, 546)
    assert found.in_words() == (
        "1 new tokens: 1 in unused rows; 1 (<move_left>) known from an earlier training and trained on; "
        "1 (left) one token already, left as it is"
    )
    own = load_processor(str(first), Config(new_tokens=str(file))).tokenizer
    assert own("x left").input_ids == processor.tokenizer("x left").input_ids
    config = Config(model=str(first), new_tokens=str(file), device="cpu", dtype="float32")
    model = build_model(config, str(first), processor, CPU).model
    assert torch.equal(model.get_input_embeddings().weight[545], embedding(first)[545])


def test_a_file_of_nothing_new_changes_nothing(tiny_path, tmp_path, needs_peft):
    file = tmp_path / "tokens.txt"
    file.write_text("left\n")
    config = Config(model=str(tiny_path), new_tokens=str(file), device="cpu", dtype="float32", lora_rank=4)
    found = new_tokens.of(config, str(tiny_path))
    assert found.in_words() == "0 new tokens: 0 in unused rows; 1 (left) one token already, left as it is"
    model = build_model(config, str(tiny_path), load_processor(str(tiny_path), config), CPU)
    assert not [name for name, _ in model.named_parameters() if "new_rows" in name]


# ---- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_the_gradients_of_the_rows_are_those_of_peft(kind, paths, files, needs_peft):
    """peft's own trainable_token_indices on transformers' own forward pass, sample by sample."""
    path = paths[kind]
    config = Config(model=str(path), new_tokens=files["moves"], device="cpu", dtype="float32", lora_rank=4)
    processor = load_processor(str(path), config)
    model = build_model(config, str(path), processor, CPU)
    samples = Samples(load_examples([files["data"]], processor), processor, Budget())
    batch = Collator()([samples[index] for index in range(8)])
    model(batch).backward()
    rows = dict(model.model.new_rows.named_parameters())

    base = Qwen2VLForConditionalGeneration.from_pretrained(path, dtype=torch.float32)
    reference = new_tokens.matrices(base)
    with torch.no_grad():
        for name, weight in reference.items():
            weight[545:549] = rows[name]
    ids = [545, 546, 547, 548]
    indices = ids if kind == "tied" else {"embed_tokens": ids, "lm_head": ids}
    theirs = needs_peft.get_peft_model(base, needs_peft.LoraConfig(
        r=4, target_modules=["q_proj"], trainable_token_indices=indices, task_type="CAUSAL_LM"))  # fmt: skip
    for index in range(8):
        encoded = samples[index].encoded
        token_ids = torch.tensor([encoded.input_ids])
        labels = torch.where(torch.tensor([encoded.supervised]), token_ids, -100)
        number = int((labels[0, 1:] != -100).sum())
        (theirs(input_ids=token_ids, labels=labels).loss * number).backward()
    found = {name: p.grad for name, p in theirs.named_parameters() if "trainable_tokens_delta" in name}
    assert len(found) == len(rows)
    for name, gradient in found.items():
        own = rows["head" if "lm_head" in name else "embedding"].grad
        assert gradient.abs().max() > 1e-3
        torch.testing.assert_close(own, gradient, rtol=1e-4, atol=1e-5, msg=f"{name}: another gradient than peft's")


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_beside_adapters_only_the_new_rows_are_trained(kind, paths, files, needs_peft):
    """After steps with a strong decay all other rows are bit for bit as they were, and a row that has no sample is as
    it began: it may not fade."""
    path = paths[kind]
    config = Config(model=str(path), new_tokens=files["many"], device="cpu", dtype="float32", lora_rank=4,
                    weight_decay=0.9, learning_rate=0.1)  # fmt: skip
    processor = load_processor(str(path), config)
    model = build_model(config, str(path), processor, CPU)
    began = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    samples = Samples(load_examples([files["data"]], processor), processor, Budget())
    optimizer = build_optimizer(model, config)
    of_rows = [
        group for group in optimizer.param_groups if any(p is model.model.new_rows.embedding for p in group["params"])
    ]
    assert [group["weight_decay"] for group in of_rows] == [0.0]
    for _ in range(2):
        model(Collator()([samples[index] for index in range(8)])).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        moved = not torch.equal(parameter, began[name])
        assert moved == (".lora_" in name or "new_rows" in name), name
    assert (model.model.new_rows.embedding[:4] - began["model.new_rows.embedding"][:4]).abs().min() > 0


def test_counted_parameters_are_those_that_are_trained(paths, files, needs_peft):
    for kind, path in paths.items():
        config = Config(model=str(path), new_tokens=files["many"], device="cpu", dtype="float32", lora_rank=4)
        model = build_model(config, str(path), load_processor(str(path), config), CPU)
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        total = sum(parameter.numel() for parameter in model.parameters())
        model_config = load_config(str(path), config)
        counts = memory.count_parameters(model_config, config)
        assert sum(counts["adapters"].values()) == trained
        assert sum(counts[part] for part in ("vision", "merger", "language_model")) == total - trained
        rows = 104 * 128 * (1 if kind == "tied" else 2)
        assert trained - sum(lora.count_adapters(model_config, config).values()) == rows
        size = [Size(100, 10, [])]
        without = Config(model=str(path), lora_rank=4)
        more = flops.training_flops(model_config, size, config) - flops.training_flops(model_config, size, without)
        assert more == 6 * 104 * 128 * 10, "three products of each supervised token with 104 rows"


@pytest.fixture(scope="module")
def trained(paths, files, tmp_path_factory):
    """A short run of each kind, made when it is first asked for: (tied or untied, full or adapters, file of tokens)."""
    folder, made = tmp_path_factory.mktemp("runs"), {}

    def train(kind: str, what: str, name: str = "moves") -> Path:
        key = f"{kind}_{what}_{name}"
        if key not in made:
            changes = {"new_tokens": files[name], "save_every": 2, **(ADAPTERS if what == "adapters" else {})}
            made[key] = Path(finetune.train(Config(**settings(paths[kind], files, folder / key, **changes))))
        return made[key]

    return train


def test_tokens_that_the_data_do_not_have_are_said(tiny_path, files, tmp_path, capsys):
    """A spelling mistake in either file: nobody would train that row on purpose."""
    file = tmp_path / "tokens.txt"
    file.write_text("<move_left>\n<move_lefft>\n")
    finetune.train(Config(**settings(tiny_path, files, tmp_path / "run", new_tokens=str(file), max_steps=1)))
    said = capsys.readouterr().out
    assert "2 new tokens: 2 in unused rows; NOT IN THE DATA (the first 8 samples): 1 (<move_lefft>)\n" in said


@pytest.mark.parametrize(("what", "kind"), [("full", "tied"), ("adapters", "untied")])
def test_resumed_it_is_the_same_run(what, kind, trained, paths, files, tmp_path, request):
    """With more rows than the model had, and the tokens in a file of another name; other tokens are refused."""
    if what == "adapters":
        request.getfixturevalue("needs_peft")
    path = paths[kind]
    whole = trained(kind, what, "many")
    part = tmp_path / "part"
    shutil.copytree(whole, part)
    shutil.rmtree(part / "checkpoints" / "step_000004")
    moved = tmp_path / "moved.txt"
    shutil.copyfile(files["many"], moved)
    changes = {**(ADAPTERS if what == "adapters" else {}), "save_every": 2, "resume": "auto"}
    with pytest.raises(
        UserError, match=r"other new tokens: its token 5 was <place_0>, in --new_tokens .*moves it is none"
    ):
        finetune.train(Config(**settings(path, files, part, new_tokens=files["moves"], **changes)))
    with pytest.raises(UserError, match="other new tokens"):
        finetune.train(Config(**settings(path, files, part, new_tokens=None, resume_anyway=True, **changes)))
    finetune.train(Config(**settings(path, files, part, new_tokens=str(moved), **changes)))
    runs.same_run(part, whole)
    assert read_state(part / "checkpoints" / "step_000004")["new_tokens"] == [*MOVES, *MANY]


# ---- what comes out -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "name"), RUNS)
def test_plain_peft_opens_the_adapter(kind, name, trained, paths, needs_peft):
    """And plain transformers does where head and embedding are one tensor."""
    run = trained(kind, "adapters", name)
    saved = load_file(run / "adapter_model.safetensors")
    rows = {key: tensor for key, tensor in saved.items() if ".lora_" not in key}
    assert {tuple(tensor.shape) for tensor in rows.values()} == {(4 if name == "moves" else 104, 128)}
    assert len(rows) == (1 if kind == "tied" else 2)
    indices = json.loads((run / "adapter_config.json").read_text())["trainable_token_indices"]
    ids = list(range(545, 549 if name == "moves" else 649))  # in the order of the rows
    assert indices == (ids if kind == "tied" else {"embed_tokens": ids, "lm_head": ids})
    ours = text_logits(load_weights(str(run), torch.float32, CPU), run)
    base = Qwen2VLForConditionalGeneration.from_pretrained(paths[kind], dtype=torch.float32)
    if name == "many":
        base.resize_token_embeddings(704)
    theirs = text_logits(needs_peft.PeftModel.from_pretrained(base, run), run)
    known = 649 if name == "many" else 576  # rows that nobody has, transformers draws at random
    torch.testing.assert_close(ours[..., :known], theirs[..., :known], rtol=1e-5, atol=1e-5)
    if kind == "tied" and name == "moves" and OPENS_TIED_ROWS:
        plain = AutoModelForImageTextToText.from_pretrained(run, dtype=torch.float32)
        torch.testing.assert_close(text_logits(plain, run), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "name"), RUNS)
def test_what_was_merged_opens_anywhere(kind, name, trained, paths, tmp_path, needs_peft):
    run = trained(kind, "adapters", name)
    merge_run(str(run), tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["vocab_size"] == (576 if name == "moves" else 704)
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    ours = text_logits(load_weights(str(run), torch.float32, CPU), run)
    torch.testing.assert_close(text_logits(merged, tmp_path / "merged"), ours, rtol=1e-5, atol=1e-5)
    before = embedding(paths[kind])
    assert torch.equal(embedding(tmp_path / "merged")[:545], before[:545])
    assert not torch.equal(embedding(tmp_path / "merged")[545], before[545])


@pytest.mark.parametrize(("what", "kind"), [("full", "tied"), ("adapters", "untied")])
def test_an_exported_checkpoint_is_the_run(what, kind, trained, tmp_path, request):
    """Also where the file of tokens is gone: the checkpoint knows them."""
    if what == "adapters":
        request.getfixturevalue("needs_peft")
    run = trained(kind, what, "many")
    known = json.loads((run / "training_config.json").read_text())
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "training_config.json").write_text(json.dumps({**known, "new_tokens": "gone.txt"}))
    export(copy / "checkpoints" / "step_000004", tmp_path / "out")
    ours, theirs = runs.weights(tmp_path / "out"), runs.weights(run)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for folder in (tmp_path / "out", run):
        assert AutoProcessor.from_pretrained(folder).tokenizer("<move_up>").input_ids == [547]


def test_over_four_bits_the_rows_are_trained(paths, files, tmp_path, needs_peft):
    pytest.importorskip("bitsandbytes", reason="NF4 needs bitsandbytes")
    changes = {"lora_rank": 4, "quantize": "nf4", "new_tokens": files["many"], "max_steps": 2}
    run = Path(finetune.train(Config(**settings(paths["untied"], files, tmp_path / "run", **changes))))
    assert runs.metrics(run)[-1] < runs.metrics(run)[0]
    merge_run(str(run), tmp_path / "merged")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    ours = text_logits(load_weights(str(run), torch.float32, CPU), run)
    torch.testing.assert_close(text_logits(merged, run), ours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("what", ["full", "adapters"])
def test_actions_are_answered_as_tokens(what, tiny_path, files, tmp_path, capsys, request):
    """From the command line to the answer: each action is one token of the sample, and one of what is generated."""
    if what == "adapters":
        request.getfixturevalue("needs_peft")
    own = {"max_steps": 60, "global_batch_size": 8, "learning_rate": 5e-3 if what == "full" else 1e-2,
           "eval_data": files["data"], "eval_every": 0, "eval_samples": 8, "eval_metrics": "exact_match"}  # fmt: skip
    if what == "adapters":
        own["lora_rank"] = 16
    config = settings(tiny_path, files, tmp_path / "run", **{**own, "data": files["data"]})
    run = Path(finetune.train(parse_arguments("test", runs.flags(config))))
    said = capsys.readouterr().out
    assert "vocabulary  4 new tokens: 4 in unused rows\n" in said
    assert runs.metrics(run, "eval_exact_match") == [1.0], "generated in the run, by transformers' own generate"

    processor = load_processor(str(run))
    samples = Samples(load_examples([files["data"]], processor), processor, Budget())
    supervised = [
        token
        for token, is_own in zip(samples[0].encoded.input_ids, samples[0].encoded.supervised, strict=True)
        if is_own
    ]
    assert supervised[:2] == [545, 545]
    assert len(supervised) == 4, "two actions, the end of the turn and its newline"
    assert "4 supervised" in show.describe(samples, 0)

    answerer = Answerer.load(str(run), processor, CPU, torch.float32)
    question = [{"role": "user", "content": [{"type": "text", "text": "Go down, then up."}]}]
    assert ask(answerer, question, Budget(), 8) == "<move_down><move_up>"
    if what == "adapters" and not OPENS_TIED_ROWS:
        return
    model = AutoModelForImageTextToText.from_pretrained(run, dtype=torch.float32).eval()
    inputs = processor.apply_chat_template(question, add_generation_prompt=True, tokenize=True, return_dict=True,
                                           return_tensors="pt")  # fmt: skip
    answer = model.generate(**inputs, max_new_tokens=8, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    assert answer[0, :2].tolist() == [548, 547]
    assert processor.batch_decode(answer, skip_special_tokens=True) == ["<move_down><move_up>"]
