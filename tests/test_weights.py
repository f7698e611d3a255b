"""How much each answer is learned: `train` and `weight` in the data, other trainers' names for them, `--train_on`.

The reference is transformers' own forward of one conversation at a time, its cross-entropies weighed by hand.
"""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import Qwen2VLForConditionalGeneration

from tests import runs
from tests.conftest import ROOT
from tests.samples import assistant, entry, user
from util.collator import Collator
from util.config import Config, UserError
from util.dataset import DataError, Examples, Samples
from util.formats.convert import convert
from util.model import build_model
from util.results.evaluate import evaluate_loss, questions_of
from util.vision import Budget

CPU = torch.device("cpu")
# Two samples, of weight 1 and 2: the first has an answer that is not learned, one of half a weight, and a plain one.
WEIGHTED = [
    entry(
        user("What is two and two?"), {**assistant("five, I am sure"), "train": False},
        user("Again."), {**assistant("four"), "weight": 0.5},
        user("And three and three?"), assistant("six, as it always was"),
    ),
    {**entry(user("Say red."), {**assistant("red"), "weight": 1.5}), "weight": 2},
]  # fmt: skip
BY_HAND = [[0.0, 0.5, 1.0], [3.0]]  # of each answer
CASES = ROOT.parent / "shared" / "cases"


def write(folder: Path, rows: list, name: str = "data.json") -> str:
    (folder / name).write_text("\n".join(map(json.dumps, rows)) if name.endswith("l") else json.dumps(rows))
    return str(folder / name)


def answers_with_spans(messages: list[dict], tokenizer) -> list[tuple[int, int]]:
    """[begin, end) of each answer's tokens in the whole conversation, its end and the newline after it included.

    Lengths of ever longer beginnings of the conversation, rendered and tokenised anew by transformers.
    """
    lengths = []
    for upto in range(1, len(messages) + 1):
        waits = messages[upto - 1]["role"] == "user"
        text = tokenizer.apply_chat_template(messages[:upto], tokenize=False, add_generation_prompt=waits)
        lengths.append(len(tokenizer(text)["input_ids"]))
    return list(pairwise(lengths))[::2]


@pytest.fixture(scope="module")
def reference(tiny_path, processor) -> dict:
    """Weighted mean loss and its gradients by transformers' forward, conversation by conversation."""
    model = Qwen2VLForConditionalGeneration.from_pretrained(tiny_path, dtype=torch.float32)
    tokenizer = processor.tokenizer
    total, divisor = torch.zeros(()), 0.0
    for row, weights in zip(WEIGHTED, BY_HAND, strict=True):
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        ids = torch.tensor(tokenizer(text)["input_ids"])
        logits = model(input_ids=ids[None]).logits[0]
        for (begin, end), weight in zip(answers_with_spans(row["messages"], tokenizer), weights, strict=True):
            assert tokenizer.decode(ids[end - 2 : end]) == "<|im_end|>\n"
            total = total + weight * F.cross_entropy(logits[begin - 1 : end - 1], ids[begin:end], reduction="sum")
            divisor += weight * (end - begin)
    (total / divisor).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": (total / divisor).item(), "divisor": divisor, "gradients": gradients}


@pytest.mark.parametrize("groups", [[[0, 1]], [[1], [0]]], ids=["one row", "two rows"])
def test_weighted_loss_and_gradients_equal_transformers(groups, tiny_path, processor, reference, tmp_path):
    samples = Samples(Examples([write(tmp_path, WEIGHTED)], processor), processor, Budget())
    model = build_model(Config(device="cpu", dtype="float32"), str(tiny_path), processor, CPU)
    batches = [Collator()([samples[index] for index in group]) for group in groups]
    divisor = sum(batch.counts["supervised_weight"] for batch in batches)
    assert divisor == reference["divisor"]
    total = 0.0
    for batch in batches:
        loss = model(batch)
        (loss / divisor).backward()
        total += loss.item()
    assert total / divisor == pytest.approx(reference["loss"], abs=1e-5)
    ours = {name.removeprefix("model."): p.grad for name, p in model.named_parameters() if p.grad is not None}
    for name, gradient in reference["gradients"].items():
        torch.testing.assert_close(
            ours[name], gradient, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
    sums = evaluate_loss(model, batches, CPU)
    assert sums["loss_sum"] / sums["supervised_weight"] == pytest.approx(reference["loss"], abs=1e-5)


def test_many_rows_of_logits_are_weighed_as_few(tiny_path, processor, reference, tmp_path, monkeypatch):
    monkeypatch.setattr("util.loss.LOGIT_ROWS", 5)
    samples = Samples(Examples([write(tmp_path, WEIGHTED)], processor), processor, Budget())
    model = build_model(Config(device="cpu", dtype="float32"), str(tiny_path), processor, CPU)
    batch = Collator()([samples[0], samples[1]])
    loss = model(batch).item() / batch.counts["supervised_weight"]
    assert loss == pytest.approx(reference["loss"], abs=1e-5)


def test_an_answer_that_is_not_learned_is_read_and_no_target(tiny_path, processor, tmp_path):
    """That it adds nothing to any gradient, transformers says above: there it has a weight of 0."""
    first = WEIGHTED[0]["messages"][:2]
    rows = [entry(*first, user("Again."), assistant("four"))]
    model = build_model(Config(device="cpu", dtype="float32"), str(tiny_path), processor, CPU)
    sample = Samples(Examples([write(tmp_path, rows)], processor), processor, Budget())[0]
    batch = Collator()([sample])
    text = processor.tokenizer.decode(batch.target_ids)
    assert text == "four<|im_end|>\n", "only the second answer is a target"
    assert sample.encoded.unlearned == len(processor.tokenizer("five, I am sure<|im_end|>\n")["input_ids"])
    whole = Samples(Examples([write(tmp_path, [entry(user("What is two and two?"), assistant("five, I am sure"), user("Again."), assistant("four"))])], processor), processor, Budget())[0]  # fmt: skip
    assert whole.encoded.input_ids == sample.encoded.input_ids, "what is learned changes no token"
    embeddings, deeper = model.embed(batch)
    hidden = embeddings.detach().requires_grad_()
    model.token_losses(model.supervised_rows(batch, hidden, deeper), batch.target_ids).sum().backward()
    end = sample.encoded.supervised.index(True) + len(batch.target_ids) - 1
    assert hidden.grad is not None
    assert hidden.grad[:end].abs().sum() > 0, "the answer that is not learned is still read"


# ---- through the training script -------------------------------------------------------------------------------------


@pytest.fixture
def train(tiny_path, tmp_path, monkeypatch):
    """Train tiny with these changes; the run directory."""
    import finetune

    monkeypatch.chdir(tmp_path)
    numbers = iter(range(99))

    def run(**changes) -> Path:
        settings = runs.settings(tiny_path, tmp_path / f"run{next(numbers)}", **changes)
        return Path(finetune.train(Config(**settings)))

    return run


def test_micro_batches_change_nothing_with_weights(train, tmp_path):
    texts = ["red", "a green one", "blue", "yellow, mostly", "white or grey"]
    rows = [
        *WEIGHTED,
        *[{**entry(user(f"Say {t}"), assistant(t)), "weight": 0.25 * (n + 1)} for n, t in enumerate(texts)],
    ]
    data = [write(tmp_path, rows)]
    one, two, seven = (
        train(data=data, dtype="float64", micro_batch_size=size, global_batch_size=7, max_steps=4) for size in (1, 2, 7)
    )
    losses = runs.metrics(one)
    for other in (two, seven):
        assert runs.metrics(other) == pytest.approx(losses, abs=1e-5)
        for name, tensor in runs.weights(one).items():
            assert (tensor - runs.weights(other)[name]).abs().max() < 1e-12, name
    plain = [
        {"messages": [{k: v for k, v in m.items() if k in ("role", "content")} for m in row["messages"]]}
        for row in rows
    ]
    unweighted = train(data=[write(tmp_path, plain, "plain.json")], dtype="float64", global_batch_size=7, max_steps=4)
    assert abs(runs.metrics(unweighted)[0] - losses[0]) > 1e-3, "the weights make a difference"


def test_the_plan_and_check_say_what_is_not_learned(train, tmp_path, capsys, processor):
    from util.cost.check_data import main as check

    data = write(tmp_path, WEIGHTED)
    out = [len(processor.tokenizer(f"{text}<|im_end|>\n")["input_ids"]) for text in ("five, I am sure", "four", "red")]
    train(data=[data], max_steps=1)
    plan = capsys.readouterr().out
    wanted = f"not learned  {out[0]} tokens of answers in 1 samples"
    assert wanted in plan
    assert f"weights  {out[1] + out[2]} supervised tokens of 2 samples count less or more than 1" in plan
    check([data])
    checked = capsys.readouterr().out
    assert " ".join(wanted.split()) in " ".join(checked.split())


def test_train_on_last_learns_the_last_answer_alone(train, tmp_path, capsys):
    """Also at a second start, which knows the sizes of the first one; and a resumed run may not change it."""
    data = write(
        tmp_path,
        [entry(user("A?"), assistant("first"), user("B?"), assistant("second")), entry(user("C?"), assistant("third"))],
    )
    everything = train(data=[data], max_steps=1)
    tokens = runs.metrics(everything, "supervised_tokens")
    last = train(data=[data], max_steps=1, train_on="last", save_every=1)
    (fewer,) = runs.metrics(last, "supervised_tokens")
    assert fewer < tokens[0]
    told = capsys.readouterr().out
    assert f"{tokens[0] - fewer} tokens of answers in 1 samples" in told
    with pytest.raises(UserError, match="train_on"):
        train(data=[data], max_steps=1, train_on="all", resume=str(last))


def test_nothing_left_to_learn_with_train_on_last_is_said(tmp_path, processor):
    rows = [entry(user("A?"), assistant("first"), user("B?"), {**assistant("second"), "train": False})]
    data = write(tmp_path, rows)
    assert len(Examples([data], processor)[0].messages) == 4
    with pytest.raises(DataError, match=r"sample 0: none of its answers is to be learned with --train_on last; take"):
        Examples([data], processor, "last")[0]


def test_an_answer_that_is_not_learned_is_no_reference(tmp_path, processor):
    questions = questions_of(Examples([write(tmp_path, WEIGHTED)], processor))
    references = [question.messages[-1]["content"][0]["text"] for question in questions]
    assert references == ["four", "six, as it always was", "red"]


def test_show_marks_weights(tmp_path, capsys, monkeypatch):
    from util.results.show import main as show

    monkeypatch.chdir(ROOT)
    show([write(tmp_path, WEIGHTED)])
    shown = capsys.readouterr().out
    assert "of answers not learned" in shown.splitlines()[0]
    assert "┃ 0.5  four<|im_end|>⏎" in shown
    assert "┃ six, as it always was<|im_end|>⏎" in shown
    line = next(line for line in shown.splitlines() if "five, I am sure" in line)
    assert "┃" not in line
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    show([write(tmp_path, WEIGHTED)])
    shown = capsys.readouterr().out
    assert "\033[33mfour" in shown, "yellow: counts less"
    assert "\033[32msix" in shown
    show([write(tmp_path, WEIGHTED), "--sample", "1"])
    assert "\033[34mred" in capsys.readouterr().out, "blue: counts more"


# ---- other trainers' names -------------------------------------------------------------------------------------------

NAMES = {
    "ms-swift": ({"loss": False}, {"train": False}),
    "LLaMA-Factory, nothing": ({"loss_weight": 0.0}, {"train": False}),
    "LLaMA-Factory, half": ({"loss_weight": 0.5}, {"weight": 0.5}),
    "OpenAI and axolotl, nothing": ({"weight": 0}, {"train": False}),
    "OpenAI and axolotl, whole": ({"weight": 1}, {}),
    "axolotl": ({"training": False}, {"train": False}),
    "as here": ({"train": False}, {"train": False}),
    "a number as text": ({"loss_weight": "0.25"}, {"weight": 0.25}),
    "whole": ({"loss": True}, {}),
    "null": ({"loss": None, "weight": None}, {}),
}
FORMATS = {
    "LLaVA": lambda keys: {
        "conversations": [
            {"from": "human", "value": "A?"}, {"from": "gpt", "value": "a", **keys},
            {"from": "human", "value": "B?"}, {"from": "gpt", "value": "b"},
        ]
    },
    "Qwen-VL": lambda keys: {
        "conversations": [
            {"from": "user", "value": "<ref>x</ref> A?"}, {"from": "assistant", "value": "a", **keys},
            {"from": "user", "value": "B?"}, {"from": "assistant", "value": "b"},
        ]
    },
    "Hugging Face": lambda keys: {
        "messages": [user([{"type": "image"}]), {**assistant("a"), **keys}, user("B?"), assistant("b")], "images": ["a.png"],
    },
    "OpenAI": lambda keys: entry(
        user([{"type": "image_url", "image_url": {"url": "a.png"}}]), {**assistant("a"), **keys}, user("B?"), assistant("b")
    ),
    "own": lambda keys: entry(user("A?"), {**assistant("a"), **keys}, user("B?"), assistant("b")),
}  # fmt: skip


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("name", NAMES)
def test_convert_maps_every_name(name, format_name, tmp_path):
    keys, wanted = NAMES[name]
    data = write(tmp_path, [FORMATS[format_name](keys)])
    said = convert([data], str(tmp_path / "out.json"))
    (row,) = json.loads((tmp_path / "out.json").read_text())
    one, other = (message for message in row["messages"] if message["role"] == "assistant")
    assert {key: one[key] for key in one.keys() - {"role", "content"}} == wanted
    assert other.keys() == {"role", "content"}
    assert "left out" not in said


@pytest.mark.parametrize("name", ["ms-swift", "LLaMA-Factory, half", "axolotl"])
def test_training_refuses_other_names_and_says_the_command(name, tmp_path, processor):
    keys, wanted = NAMES[name]
    data = write(tmp_path, [FORMATS["own"](keys)])
    with pytest.raises(DataError) as raised:
        Examples([data], processor)[0]
    (key, value), (own, _) = next(iter(keys.items())), next(iter(wanted.items()))
    message = str(raised.value)
    assert f"{data}, sample 0, message 1: {key} {value!r} is written '{own}': " in message
    assert "python -m util convert" in message
    assert "\n" not in message


def test_a_sample_that_is_not_to_be_learned_is_refused_by_convert_too(tmp_path):
    for keys in ({"weight": 0}, {"loss": False}):
        data = write(tmp_path, [{**FORMATS["LLaVA"]({}), **keys}])
        with pytest.raises(DataError, match="sample 0: nothing of it is to be learned; take the sample out"):
            convert([data], str(tmp_path / "out.json"))


def test_a_sample_weight_stays(tmp_path):
    data = write(tmp_path, [{**FORMATS["LLaVA"]({}), "weight": 2}, {**FORMATS["own"]({}), "loss_weight": 0.5}])
    convert([data], str(tmp_path / "out.json"))
    assert [row["weight"] for row in json.loads((tmp_path / "out.json").read_text())] == [2.0, 0.5]


def test_a_weight_in_a_table_of_products_is_no_weight_of_the_loss(tmp_path):
    (tmp_path / "products.csv").write_text("image,caption,weight\na.png,A jug.,250\n")
    said = convert([str(tmp_path / "products.csv")], str(tmp_path / "out.json"))
    (row,) = json.loads((tmp_path / "out.json").read_text())
    assert row.keys() == {"messages"}
    assert "weight (1)" in said


def test_llama_factory_and_trl_say_what_is_learned(tmp_path):
    v1 = json.loads((CASES / "fmt_lf_v1.json").read_text()) if CASES.exists() else []
    shown = [user([{"type": "image"}]), assistant("shown, not learned"), user("And?")]
    trl = {"prompt": shown, "completion": [assistant("learned")], "images": ["a.png"]}
    convert([write(tmp_path, [*v1, trl])], str(tmp_path / "out.json"))
    *_, row = json.loads((tmp_path / "out.json").read_text())
    answers = [message for message in row["messages"] if message["role"] == "assistant"]
    assert [message.get("train", True) for message in answers] == [False, True]
