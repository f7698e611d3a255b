"""The loop as a whole: batch arithmetic, precision, determinism, resuming, freezing, on `tiny` and the showcase data."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import finetune
from tests import runs
from tests.runs import metrics, weights
from util.command_line import UserError
from util.config import Config
from util.mixed_adamw import exact_value
from util.tensors import part_of

ROOT = Path(__file__).resolve().parent.parent
SHOWCASE = str(ROOT / "train_data" / "data.json")  # every kind of sample, answers of unequal length


@pytest.fixture
def train(tiny_path, tmp_path, monkeypatch):
    """Train tiny on the showcase in small pictures, 4 steps unless told; return the run directory."""
    monkeypatch.chdir(ROOT)
    numbers = iter(range(1000))

    def run(**changes) -> Path:
        own = {"data": [SHOWCASE], "max_steps": 4, "epochs": Config.epochs}
        settings = runs.settings(tiny_path, tmp_path / f"run{next(numbers)}", **{**own, **changes})
        return Path(finetune.train(Config(**settings)))

    return run


def gap(one: dict, other: dict) -> float:
    assert one.keys() == other.keys()
    assert one
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one)


def test_micro_batches_change_nothing(train):
    """8x1 = 4x2 = 2x4 = 1x8, unequal answer lengths, four steps: the last, shorter global batch of the epoch included."""
    for dtype, key, tolerance in (("float32", "loss", 1e-5), ("float64", "weights", 1e-12)):
        runs = [train(dtype=dtype, micro_batch_size=size) for size in (1, 2, 4, 8)]
        losses = [metrics(run) for run in runs]
        assert len(losses[0]) == 4
        assert metrics(runs[0], "samples") == [8, 8, 8, 7], "the left-over samples of the epoch are a step of their own"
        for run, series in zip(runs[1:], losses[1:], strict=True):
            assert series == pytest.approx(losses[0], abs=1e-5)
            if key == "weights":
                assert gap(weights(run), weights(runs[0])) < tolerance


def test_max_tokens_changes_nothing(train, tmp_path):
    """Packed rows of few tokens and of many: the same losses. Samples with tools, which are long, are left out."""
    (tmp_path / "media").symlink_to(ROOT / "train_data" / "media")
    short = [entry for entry in json.loads(Path(SHOWCASE).read_text()) if "tools" not in entry]
    (tmp_path / "short.json").write_text(json.dumps(short))
    few, many = (train(data=[str(tmp_path / "short.json")], max_tokens=most) for most in (256, 20480))
    assert metrics(few) == pytest.approx(metrics(many), abs=1e-5)


def test_the_mean_of_means_is_another_number(train, tiny_path, processor):
    """What a loop that averages micro-batch means would report differs: answers are of unequal length."""
    from util.collator import Collator
    from util.dataset import Samples, load_examples
    from util.model import build_model
    from util.vision import Budget

    ours = metrics(train(max_steps=1, micro_batch_size=1))[0]
    config = Config(device="cpu", dtype="float32")
    model = build_model(config, str(tiny_path), processor, torch.device("cpu"))
    budget = Budget(min_pixels=3136, max_pixels=28 * 28 * 16, video_max_frames=4)
    samples = Samples(load_examples([SHOWCASE], processor), processor, budget)
    batches = [Collator()([samples[index]]) for index in samples.examples.order(0, 0)[:8]]
    sums, counts = [model(batch).item() for batch in batches], [len(batch.target_ids) for batch in batches]
    assert ours == pytest.approx(sum(sums) / sum(counts), abs=1e-5)
    mean_of_means = sum(total / count for total, count in zip(sums, counts, strict=True)) / len(sums)
    assert abs(ours - mean_of_means) > 1e-3


def test_same_seed_same_bits_other_seed_other_bits(train):
    one, two, other = train(num_workers=2), train(num_workers=0), train(seed=1)
    assert metrics(one) == metrics(two)
    assert gap(weights(one), weights(two)) == 0
    assert metrics(one) != metrics(other)


def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(train):
    """6 steps = 3 steps + resume + 3 steps: in the middle of the first epoch and across its end."""
    whole = train(max_steps=6)
    halted = train(max_steps=6, save_every=3)
    checkpoint = halted / "checkpoints" / "step_000003"
    assert sorted(path.name for path in (halted / "checkpoints").iterdir()) == ["step_000003", "step_000006"]
    (halted / "model.safetensors").unlink()
    shutil.rmtree(halted / "checkpoints" / "step_000006")  # as if it had been killed between the two
    resumed = train(max_steps=6, save_every=3, resume="auto", output_dir=str(halted))
    assert resumed == halted
    assert metrics(resumed) == metrics(whole)
    assert metrics(resumed, "step") == [1, 2, 3, 4, 5, 6], "steps repeated after resuming must not be logged twice"
    assert gap(weights(resumed), weights(whole)) == 0
    elsewhere = train(max_steps=6, resume=str(checkpoint))
    assert gap(weights(elsewhere), weights(whole)) == 0


def test_checkpoints_kept_and_found(train):
    run = train(max_steps=6, save_every=1, keep=2)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_000005", "step_000006"]
    with pytest.raises(UserError, match="no checkpoint there"):
        train(resume=str(run / "checkpoints" / "nothing"))


def test_a_run_directory_is_not_written_over(train):
    run = train(max_steps=1)
    before = (run / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match="holds a run already"):
        train(max_steps=1, output_dir=str(run))
    assert (run / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("frozen", [["vision"], ["merger", "language_model"]])
def test_frozen_parts_do_not_move(frozen, train, tiny_path):
    after, before = weights(train(freeze=frozen)), load_file(tiny_path / "model.safetensors")
    moved = {name: not torch.equal(after[name], before[name]) for name in before}
    for name, has_moved in moved.items():
        if part_of(name) in frozen:
            assert not has_moved, f"{name} is frozen and moved"
    assert any(moved.values())


@pytest.mark.parametrize(
    "trained", [{"freeze": ["language_model"]}, {"freeze": ["language_model"], "lora_rank": 4, "lora_vision": True}]
)
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_texts_beside_a_tower_that_alone_is_trained(trained, dtype, train, tmp_path):
    """A micro-batch of text has no gradient then, but its tokens count: one sample a pass is all in one, and a step of
    text alone moves nothing."""
    few, many = (train(dtype=dtype, micro_batch_size=size, **trained) for size in (1, 8))
    if dtype == "float64":
        assert metrics(few) == pytest.approx(metrics(many), abs=1e-10)
        assert gap(weights(few), weights(many)) < 1e-12
    texts = [entry for entry in json.loads(Path(SHOWCASE).read_text()) if entry["kind"] == "text"]
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    still, moved = (train(data=[file], dtype=dtype, **trained) for file in (str(tmp_path / "texts.json"), SHOWCASE))
    assert metrics(still, "grad_norm") == [0.0] * len(metrics(still))
    start = train(data=[str(tmp_path / "texts.json")], dtype=dtype, learning_rate=0.0, **trained)
    assert gap(weights(still), weights(start)) == 0
    assert gap(weights(moved), weights(start)) > 0


def test_activation_checkpointing_changes_nothing(train):
    assert metrics(train(activation_checkpointing="full")) == pytest.approx(metrics(train()), abs=1e-6)


def plain(model) -> dict[str, torch.Tensor]:
    """A copy of all weights, in float32."""
    return {n: exact_value(p).float().clone() for n, p in model.named_parameters()}


def test_bfloat16_compute_keeps_exact_weights_that_move(tiny_path, processor):
    """200 steps at learning rate 1e-6: the weights follow an all-float32 run; pure bfloat16 weights stay where they are."""
    from util.collator import Collator
    from util.dataset import Samples, load_examples
    from util.model import build_model
    from util.optimizer import build_optimizer
    from util.vision import Budget

    budget = Budget(min_pixels=3136, max_pixels=3136, video_max_frames=4)
    samples = Samples(load_examples([SHOWCASE], processor), processor, budget)
    batch = Collator()([samples[index] for index in range(2)])
    moved = {}
    for name, dtype in (("float32", "float32"), ("mixed", "bfloat16"), ("pure", "float32")):
        config = Config(device="cpu", dtype=dtype, learning_rate=1e-6, weight_decay=0.0)
        model = build_model(config, str(tiny_path), processor, torch.device("cpu"))
        optimizer = build_optimizer(model, config)
        if name == "pure":
            model.to(torch.bfloat16)
            model.dtype = torch.bfloat16
            optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.0)
        begin = plain(model)
        for _ in range(200):
            (model(batch) / len(batch.target_ids)).backward()
            optimizer.step()
            optimizer.zero_grad()
        ends = plain(model)
        assert all(p.dtype == (torch.float32 if name == "float32" else torch.bfloat16) for p in model.parameters())
        moved[name] = torch.cat([(ends[n] - begin[n]).flatten() for n in sorted(ends) if ends[n].ndim >= 2])
    likeness = torch.cosine_similarity(moved["float32"], moved["mixed"], dim=0).item()
    assert moved["float32"].norm() > 0
    assert likeness > 0.9, f"mixed precision moves elsewhere than float32: cosine {likeness:.3f}"
    ratio = (moved["pure"].norm() / moved["float32"].norm()).item()
    assert ratio < 0.3, f"pure bfloat16 was expected to lose its updates, moved {ratio:.2f} of the way"
    assert (moved["mixed"].norm() / moved["float32"].norm()).item() == pytest.approx(1, abs=0.1)


def test_bfloat16_run_trains_and_saves_bfloat16(train, tiny_path):
    run = train(dtype="bfloat16", max_steps=8, epochs=10)
    losses = metrics(run)
    assert losses[-1] < losses[0] - 0.5
    assert metrics(run)[0] == pytest.approx(metrics(train())[0], rel=1e-2)
    saved = weights(run)
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    assert saved.keys() == load_file(tiny_path / "model.safetensors").keys()


@pytest.mark.parametrize(("reference", "room"), [("short", 64), ("x" * 99, 99 + 2), ("x" * 999, 256)])
def test_answers_while_training_may_be_as_long_as_their_references(reference, room, processor):
    """tiny reads x's one by one; the end of the turn and the newline after it are two tokens more."""
    from util.results.evaluate import room_for

    assert room_for(["short", reference], processor) == room
    assert room_for([], processor) == 64


def test_golden_losses(train):
    """20 steps on the showcase. `tests/golden_losses.txt` was written by this very run; CPUs differ in the last digits."""
    losses = metrics(train(max_steps=20, epochs=20))
    golden = [float(line) for line in (ROOT / "tests" / "golden_losses.txt").read_text().split()]
    assert len(golden) == 20
    assert losses == pytest.approx(golden, abs=1e-3)


def test_evaluation_loss_is_the_mean_over_held_out_tokens(train):
    test_data = str(ROOT / "test_data" / "data.json")
    run = train(eval_data=[test_data], eval_every=2)
    lines = runs.log(run)
    assert [line["step"] for line in lines if "eval_loss" in line] == [2, 4]
    unchanged = train()
    assert metrics(run) == metrics(unchanged), "evaluating must not change training"
    grouped = train(eval_data=[test_data], eval_every=0, micro_batch_size=1, eval_samples=3)
    assert metrics(grouped, "eval_questions") == [3]
    assert metrics(grouped, "eval_loss") == pytest.approx(metrics(run, "eval_loss")[-1:], abs=1e-4), "of all tokens"


def test_metrics_and_run_directory(train):
    run = train()
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    wanted = "step epoch loss learning_rate grad_norm samples tokens visual_tokens supervised_tokens step_seconds data_seconds tokens_per_second peak_memory_gib"
    assert set(wanted.split()) <= set(line)
    assert line["learning_rate"] > 0, "the first step must learn"
    shares = [line[f"flops_{part}"] for part in ("vision", "merger", "language_model", "head")]
    assert sum(shares) == pytest.approx(1, abs=1e-3), "the parts of a step's work"
    assert all(share > 0 for share in shares)
    files = {path.name for path in run.iterdir()}
    assert {"model.safetensors", "config.json", "processor_config.json", "preprocessor_config.json", "chat_template.json",
            "chat_template.jinja", "tokenizer.json", "training_config.json", "metrics.jsonl", "loss.png"} <= files  # fmt: skip
    settings = json.loads((run / "training_config.json").read_text())
    assert settings["global_batch_size"] == 8
    assert settings["versions"]["torch"] == torch.__version__


def test_learning_rate_schedule():
    from util.optimizer import learning_rate_factor

    factors = [learning_rate_factor(step, 100, Config(warmup_ratio=0.1)) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert factors[10] == 1.0
    assert factors[55] == pytest.approx(0.5)
    assert all(later < earlier for earlier, later in itertools.pairwise(factors[10:]))
    assert 0 < factors[-1] < 0.001
    assert [learning_rate_factor(s, 10, Config(schedule="constant", warmup_ratio=0)) for s in range(10)] == [1.0] * 10
    assert learning_rate_factor(5, 10, Config(schedule="linear", warmup_ratio=0)) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("settings", "factors"),
    [
        # 20 steps: 2 of warm-up, 14 that stay, and the 4 of 0.2 that fall
        ({"schedule": "wsd", "decay_ratio": 0.2}, [0.5, 1.0, *[1.0] * 14, 1.0, 0.75, 0.5, 0.25]),
        ({"schedule": "wsd", "decay_ratio": 0.2, "min_learning_rate_ratio": 0.2},
         [0.5, 1.0, *[1.0] * 14, 1.0, 0.8, 0.6, 0.4]),
        # what is rounded up does not reach into the warm-up: 2 steps rise, and 18 fall
        ({"schedule": "wsd", "decay_ratio": 0.9}, [0.5, 1.0, *((18 - n) / 18 for n in range(18))]),
        ({"schedule": "linear", "min_learning_rate_ratio": 0.1}, [0.5, 1.0, *(1 - 0.05 * n for n in range(18))]),
        ({"schedule": "constant"}, [0.5, *[1.0] * 19]),
    ],
)  # fmt: skip
def test_how_the_learning_rate_falls(settings, factors):
    from util.optimizer import learning_rate_factor

    config = Config(warmup_ratio=0.1, **settings)
    assert [learning_rate_factor(step, 20, config) for step in range(20)] == pytest.approx(factors, abs=1e-12)


@pytest.mark.parametrize("least", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_after_the_warm_up_the_learning_rate_is_that_of_transformers(schedule, least):
    """Its warm-up begins at 0, or at the least rate, where ours takes the first step that it can."""
    from transformers import optimization

    from util.optimizer import learning_rate_factor

    config = Config(schedule=schedule, warmup_ratio=0.05, min_learning_rate_ratio=least)
    weights = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    if schedule == "wsd":
        theirs = optimization.get_wsd_schedule(weights, 10, 20, 200, decay_type="linear", min_lr_ratio=least)
    elif schedule == "cosine":
        theirs = optimization.get_cosine_with_min_lr_schedule_with_warmup(weights, 10, 200, min_lr_rate=least)
    else:
        theirs = optimization.get_polynomial_decay_schedule_with_warmup(weights, 10, 200, lr_end=least, power=1.0)
    for step in range(10, 200):
        expected = theirs.lr_lambdas[0](step)
        assert learning_rate_factor(step, 200, config) == pytest.approx(expected, abs=1e-12), f"step {step}"


def test_the_least_learning_rate_is_a_share_of_each_parts_own(train):
    run = train(schedule="linear", warmup_ratio=0.0, min_learning_rate_ratio=0.5, max_steps=4, learning_rate=8e-4)
    assert metrics(run, "learning_rate") == pytest.approx([8e-4, 7e-4, 6e-4, 5e-4])
    from util.optimizer import set_learning_rate

    groups = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    weights = torch.optim.SGD(
        [{"params": [group], "peak": peak} for group, peak in zip(groups, (1e-3, 1e-4), strict=True)], lr=1.0
    )
    config = Config(schedule="linear", warmup_ratio=0.0, min_learning_rate_ratio=0.5, learning_rate=1e-3)
    assert set_learning_rate(weights, 3, 4, config) == pytest.approx(6.25e-4)
    assert [group["lr"] for group in weights.param_groups] == pytest.approx([6.25e-4, 6.25e-5])


def test_parameter_groups(tiny_path, processor):
    from util.model import build_model
    from util.optimizer import build_optimizer

    config = Config(device="cpu", dtype="float32", learning_rate=3e-4, vision_learning_rate=1e-5, weight_decay=0.1)
    model = build_model(config, str(tiny_path), processor, torch.device("cpu"))
    groups = build_optimizer(model, config).param_groups
    names = {parameter: name for name, parameter in model.named_parameters()}
    rates = {names[p]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(rates) == len(names), "every parameter is in exactly one group"
    prefix = "model.model."
    assert rates[f"{prefix}visual.blocks.0.attn.qkv.weight"] == (1e-5, 0.1)
    assert rates[f"{prefix}visual.blocks.0.norm1.weight"] == (1e-5, 0.0)
    assert rates[f"{prefix}visual.merger.mlp.0.weight"] == (3e-4, 0.1)
    assert rates[f"{prefix}language_model.layers.0.self_attn.q_proj.bias"] == (3e-4, 0.0)
    assert rates[f"{prefix}language_model.embed_tokens.weight"] == (3e-4, 0.1)


def test_evaluation_leaves_the_random_state_as_it_was(tiny_path, processor):
    from torch.utils.data import DataLoader

    from util.collator import Collator
    from util.data.bad_samples import LenientCollator
    from util.dataset import Samples, load_examples
    from util.model import build_model
    from util.results.evaluate import evaluate_answers, evaluate_loss
    from util.vision import Budget

    config = Config(device="cpu", dtype="float32", eval_data=[SHOWCASE], eval_samples=2)
    device, budget = torch.device("cpu"), Budget(min_pixels=3136, max_pixels=3136, video_max_frames=4)
    model = build_model(config, str(tiny_path), processor, device)
    samples = Samples(load_examples(config.eval_data, processor), processor, budget)
    state = torch.get_rng_state()
    totals = evaluate_loss(
        model, DataLoader(samples, batch_sampler=[[0, 1], [2]], collate_fn=LenientCollator(Collator())), device
    )
    assert (totals["samples"], totals["skipped"]) == (3, 0)
    assert torch.equal(torch.get_rng_state(), state)
    assert evaluate_answers(model, samples, device, config)["questions"] == 2
    assert torch.equal(torch.get_rng_state(), state)


def test_held_out_questions_are_drawn_from_all_kinds(tiny_path, processor, tmp_path):
    """Kinds take turns in the file, as questions about one image do: every fourth would always be the same kind."""
    from util.dataset import Samples, load_examples
    from util.model import build_model
    from util.results.evaluate import evaluate_answers
    from util.vision import Budget

    entries = [
        {"kind": "ab"[n % 2], "messages": [{"role": role, "content": f"{n}"} for role in ("user", "assistant")]}
        for n in range(24)
    ]
    (tmp_path / "data.json").write_text(json.dumps(entries))
    config = Config(device="cpu", dtype="float32", eval_data=[str(tmp_path / "data.json")], eval_samples=6)
    samples = Samples(load_examples(config.eval_data, processor), processor, Budget())
    model = build_model(config, str(tiny_path), processor, torch.device("cpu"))
    scores = evaluate_answers(model, samples, torch.device("cpu"), config)
    assert scores["questions"] == 6
    assert {"exact_match_a", "exact_match_b"} <= scores.keys()
    assert scores == evaluate_answers(model, samples, torch.device("cpu"), config), "the same questions each time"
