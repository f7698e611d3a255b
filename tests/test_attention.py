"""Packed attention: what every kernel must compute, which one a call runs on, and what is remembered of their times."""

import json
from dataclasses import replace
from functools import partial
from itertools import accumulate
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import Qwen2VLConfig

from util.attention import BACKENDS, Segments, by_operator, check_backend, stacked_sdpa
from util.command_line import UserError
from util.config import Config
from util.cost import fastest
from util.kernels import packed, rule

CPU = torch.device("cpu")
BF16 = torch.bfloat16
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

# query heads, key-value heads, width of a head: the tower's, and those of the 2B and 7B language models
HEADS = {"tower": (16, 16, 80), "2b": (12, 2, 128), "7b": (28, 4, 128)}
LENGTHS = {
    "one piece": [700],
    "equal": [96] * 6,
    "tiny": [1, 2, 3, 4, 4, 3, 2, 1, 1],
    "unequal": [(37 * number) % 61 + 5 for number in range(50)],
}
SMALL = {"one piece": [23], "equal": [5] * 4, "tiny": LENGTHS["tiny"], "unequal": [3, 7, 3, 1, 7, 7, 2]}


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(rule, "known", rule.Known())


def draw(lengths, heads, shared, width, dtype, device="cpu") -> tuple[list[torch.Tensor], torch.Tensor]:
    """q, k, v and the gradient of the output."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(sum(lengths), count, width) for count in (heads, shared, shared, heads)]
    *tensors, gradient = [torch.randn(s, generator=generator, device=device).to(dtype) for s in shapes]
    return [x.requires_grad_() for x in tensors], gradient


def by_a_mask(q, k, v, lengths: list[int], causal: bool, scale: float) -> torch.Tensor:
    """Attention over the whole row, all that lies in other pieces masked out."""
    total = len(q)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(q.device)
    allowed = owner[:, None] == owner
    if causal:
        allowed &= torch.ones(total, total, device=q.device).tril().bool()
    keys, values = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, keys) * scale
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, values)


def with_gradients(attend, tensors, gradient) -> list[torch.Tensor]:
    out = attend(*tensors)
    return [out.detach(), *torch.autograd.grad(out, tensors, gradient)]


# ---- what a kernel computes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("attend", [stacked_sdpa, by_operator("plain")], ids=["sdpa", "operator"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", SMALL.values(), ids=SMALL)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_packed_attention_is_attention_within_each_piece(attend, causal, lengths, heads):
    """By the operator, too: how it cuts a row into stacks, shares key-value heads and hands over what is kept is the
    same for every kernel; the formula alone runs anywhere."""
    tensors, gradient = draw(lengths, *heads, torch.float64)
    segments = Segments.of(lengths)
    ours = with_gradients(lambda q, k, v: attend(q, k, v, segments, causal, 0.3), tensors, gradient)
    theirs = with_gradients(lambda q, k, v: by_a_mask(q, k, v, lengths, causal, 0.3), tensors, gradient)
    for name, mine, other in zip("oqkv", ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-12, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("lengths", [[5], [4, 4, 4], [3, 7, 1]])
def test_the_operator_is_what_torch_asks_of_one(lengths):
    tensors, _ = draw(lengths, 4, 2, 8, torch.float32)
    starts = Segments.of(lengths).cu_seqlens
    torch.library.opcheck(packed.packed_attention, (*tensors, starts, starts.clone(), max(lengths), True, 0.3, "plain"))


def test_values_that_are_a_view_and_a_gradient_that_is_none_are_taken():
    """The tower's values are a view of its joined q, k and v; a loss may reach the output transposed."""
    lengths = [3, 3, 5]
    joined = torch.randn(sum(lengths), 3, 4, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, sum(lengths), 8, dtype=torch.float64)
    found = []
    for attend in (by_operator("plain"), lambda q, k, v, s, causal, scale: by_a_mask(q, k, v, lengths, causal, scale)):
        out = attend(*joined.unbind(1), Segments.of(lengths), False, 0.3)
        found.append(torch.autograd.grad((out.transpose(0, 1) * weight).sum(), joined)[0])
    torch.testing.assert_close(*found, atol=1e-12, rtol=0)


@needs_gpu
@pytest.mark.parametrize("backend", [*rule.WORDS, "auto", "flash_attn"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_every_kernel_of_this_gpu_equals_float32(backend, causal, heads, lengths):
    try:
        check_backend(backend)
    except UserError as error:
        pytest.skip(str(error))
    rounded, gradient = draw(lengths, *heads, BF16, "cuda")
    exact = [x.detach().float().requires_grad_() for x in rounded]
    segments = Segments.of(lengths).to(torch.device("cuda"))
    scale = heads[2] ** -0.5
    ours = with_gradients(lambda q, k, v: BACKENDS[backend](q, k, v, segments, causal, scale), rounded, gradient)
    theirs = with_gradients(lambda q, k, v: by_a_mask(q, k, v, lengths, causal, scale), exact, gradient.float())
    torch.testing.assert_close(ours[0].float(), theirs[0], atol=2e-2, rtol=2e-2)
    for mine, other in zip(ours[1:], theirs[1:], strict=True):
        assert (mine.float() - other).norm() < 1e-2 * other.norm()
    assert not rule.known.refused, f"the rule chose a kernel that does not do: {rule.known.refused}"


# ---- in a compiled graph, under checkpoints ---------------------------------------------------------------------------


def test_one_graph_without_a_break_serves_rows_of_all_lengths():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    attend = by_operator("plain")

    def layer(hidden, segments):
        q = hidden.unflatten(1, (4, 8))
        out = attend(q, q[:, :2], q[:, 2:], segments, True, 0.3)
        return out.flatten(1).sin()

    compiled = torch.compile(layer, backend="aot_eager", dynamic=True)
    for number in range(2, 14):
        lengths = [number + place % 3 for place in range(number)]
        hidden = torch.randn(sum(lengths), 32, dtype=torch.float64, requires_grad=True)
        segments = Segments.of(lengths)
        found, expected = compiled(hidden, segments), layer(hidden, segments)
        torch.testing.assert_close(found, expected)
        mine, other = (torch.autograd.grad(out.sum(), hidden)[0] for out in (found, expected))
        torch.testing.assert_close(mine, other)
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1


def test_selective_checkpoints_can_keep_its_output(monkeypatch):
    passes = []
    plain = packed.kernel("plain")

    def forward(*given):
        passes.append(1)
        return plain.forward(*given)

    monkeypatch.setattr(packed, "kernel", lambda name: replace(plain, forward=forward))

    def policy(context, operation, *args, **kwargs):
        keeps = operation is torch.ops.qwen2_vl.packed_attention.default
        return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE

    tensors, gradient = draw([3, 4], 4, 2, 8, torch.float64)
    segments = Segments.of([3, 4])

    def layer(q, k, v):
        return by_operator("plain")(q.sin(), k, v, segments, True, 0.3).sin()

    contexts = partial(create_selective_checkpoint_contexts, policy)
    kept = with_gradients(
        lambda *given: checkpoint(layer, *given, use_reentrant=False, context_fn=contexts), tensors, gradient
    )
    assert len(passes) == 1, "attention ran again in the backward pass"
    for mine, other in zip(kept, with_gradients(layer, tensors, gradient), strict=True):
        assert torch.equal(mine, other)


# ---- the rule -------------------------------------------------------------------------------------------------------

EVERY = frozenset(rule.WORDS)
TORCH_211 = frozenset({"varlen", "dense", "dense_flash"})  # on a Hopper, without any package
TORCH_214 = TORCH_211 | {"cudnn"}
TABLE = [
    # capability, heads, causal, lengths, what is installed -> the kernel
    ((8, 0), "2b", True, [2048] * 8, EVERY, "varlen"),  # an A100
    ((8, 9), "tower", False, [1024] * 16, EVERY, "varlen"),  # a consumer's Ada
    ((12, 0), "tower", False, [1024] * 16, EVERY, "varlen"),  # a consumer's Blackwell
    ((0, 0), "tower", False, [1024] * 16, EVERY, "varlen"),
    ((9, 0), "tower", False, [1024] * 16, TORCH_211, "dense"),  # images of 448 x 448
    ((9, 0), "tower", False, [4096] * 4, TORCH_211, "dense"),
    ((9, 0), "tower", False, [200, 5000, 3000], TORCH_211, "varlen"),
    ((9, 0), "tower", False, [256] * 64, TORCH_211, "varlen"),  # small images: nothing to gain
    ((9, 0), "tower", False, [1024], TORCH_211, "varlen"),  # alone: its plan is built for it alone
    ((9, 0), "tower", False, [1024] * 16, TORCH_214, "dense"),
    ((9, 0), "tower", False, [200, 5000, 3000], TORCH_214, "cudnn"),  # as torch's own varlen_attn there
    ((9, 0), "tower", False, [100, 64, 128], TORCH_214, "varlen"),  # which does not do so below 129
    ((9, 0), "2b", True, [2048] * 8, TORCH_214, "dense"),
    ((9, 0), "7b", True, [16384], TORCH_214, "dense"),
    ((9, 0), "7b", True, [4096], TORCH_214, "varlen"),
    ((9, 0), "2b", True, [100, 3000, 700], TORCH_214, "varlen"),  # grouped heads: cuDNN is not asked
    ((9, 0), "2b", True, [100, 3000, 700], EVERY, "flash_3"),
    ((9, 0), "tower", False, [1024] * 16, EVERY, "flash_3"),
    ((10, 0), "tower", False, [1024] * 16, EVERY, "flash_4"),
    ((10, 3), "2b", True, [100, 3000, 700], EVERY, "flash_4"),
    ((10, 0), "tower", False, [200, 5000, 3000], TORCH_214, "cudnn"),
    ((10, 0), "2b", True, [2048] * 8, EVERY - {"flash_4"}, "dense"),
]  # fmt: skip


def call(capability, heads: str, causal: bool, lengths: list[int], dtype=BF16) -> rule.Call:
    runs = packed.runs_of((0, *accumulate(lengths)))
    return rule.Call(capability, dtype, *HEADS[heads], causal, len(lengths), max(lengths), sum(lengths), len(runs))


@pytest.mark.parametrize(("capability", "heads", "causal", "lengths", "available", "expected"), TABLE)
def test_the_rule(capability, heads, causal, lengths, available, expected):
    assert rule.choose(call(capability, heads, causal, lengths), available) == expected


def test_no_kernel_serves_what_is_not_of_16_bits_or_no_gpu():
    for name in rule.WORDS:
        assert not rule.serves(name, call((9, 0), "tower", False, [1024], torch.float32)), name
        assert not rule.serves(name, call((0, 0), "tower", False, [1024])), name


def test_pieces_are_run_together_where_neighbours_are_equal():
    assert packed.runs_of((0, 3, 6, 7)) == ((2, 3), (1, 1))
    assert packed.runs_of((0, 5, 9, 14)) == ((1, 5), (1, 4), (1, 5))
    assert packed.runs_of((0, 4, 4, 8)) == ((2, 4),), "an empty piece has no row"


def test_alike_lengths_have_one_name():
    names = {
        tuple(lengths): call((9, 0), "2b", True, lengths).bucket for lengths in ([1024] * 16, [600] * 3, [512] * 3)
    }
    assert names[(1024,) * 16] == names[(600,) * 3] == "12/2 x 128 causal, longest 1024, equal"
    assert names[(512,) * 3] == "12/2 x 128 causal, longest 512, equal"
    assert call((9, 0), "tower", False, [1000, 30, 20]).bucket == "16/16 x 80, longest 1024, mean 512"


# ---- a kernel that fails --------------------------------------------------------------------------------------------


@pytest.fixture
def hopper(monkeypatch):
    """The kernels of a Hopper by the formula on the CPU; what each was asked for, in order."""
    asked = []
    plain = packed.kernel("plain")

    def watched(name: str) -> packed.Kernel:
        def forward(*given):
            asked.append(name)
            return plain.forward(*given)

        def backward(*given):
            asked.append(f"{name} backward")
            return plain.backward(*given)

        return packed.Kernel(forward, backward)

    kernels = {name: watched(name) for name in rule.WORDS}
    monkeypatch.setattr(packed, "kernel", lambda name: kernels[name])
    monkeypatch.setattr(packed, "capability", lambda device: (9, 0))
    monkeypatch.setattr(rule, "installed", lambda: TORCH_211)
    return SimpleNamespace(asked=asked, kernels=kernels, plain=plain)


def run_auto(lengths: list[int]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Output and gradients under `auto`, and by the mask."""
    tensors, gradient = draw(lengths, 2, 2, 8, BF16)
    segments = Segments.of(lengths)
    exact = [x.detach().float().requires_grad_() for x in tensors]
    ours = with_gradients(lambda q, k, v: BACKENDS["auto"](q, k, v, segments, False, 0.3), tensors, gradient)
    theirs = with_gradients(lambda q, k, v: by_a_mask(q, k, v, lengths, False, 0.3), exact, gradient.float())
    return ours, theirs


def assert_near(ours, theirs) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine.float() - other).norm() < 1e-2 * other.norm()


def test_auto_proves_a_kernel_once_and_uses_it_forward_and_backward(hopper):
    assert_near(*run_auto([512, 512]))
    proof = ["varlen", "varlen backward", "dense", "dense backward"]
    assert hopper.asked == [*proof, "dense", "dense backward"]
    hopper.asked.clear()
    assert_near(*run_auto([600, 600]))
    assert hopper.asked == ["dense", "dense backward"]
    hopper.asked.clear()
    assert_near(*run_auto([512, 40, 512]))
    assert hopper.asked == ["varlen", "varlen backward"]


def test_auto_drops_a_kernel_whose_gradients_are_wrong(hopper, capsys):
    def wrong(*given):
        of_q, of_k, of_v = hopper.plain.backward(*given)
        return of_q, of_k * 1.1, of_v

    hopper.kernels["dense"] = replace(hopper.plain, backward=wrong)
    for _ in range(2):
        assert_near(*run_auto([512, 512]))
        assert hopper.asked[-2:] == ["varlen", "varlen backward"]
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "--attention auto" in line]
    assert "it differs from varlen by 1.0e-01 of the norm" in line


def test_auto_goes_on_where_a_kernel_refuses_a_shape(hopper, capsys):
    def picky(q, k, v, pieces, causal, scale):
        if pieces.longest == 600:
            raise RuntimeError("No valid execution plans built.\nat line 1")
        return hopper.plain.forward(q, k, v, pieces, causal, scale)

    hopper.kernels["dense"] = replace(hopper.plain, forward=picky)
    assert_near(*run_auto([512, 512]))
    assert "dense" not in rule.known.refused
    for _ in range(2):
        assert_near(*run_auto([600, 600]))
        assert hopper.asked[-2:] == ["varlen", "varlen backward"]
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "--attention auto" in line]
    assert line.endswith("longest 1024, equal: No valid execution plans built.")
    hopper.asked.clear()
    assert_near(*run_auto([512, 512]))
    assert not hopper.asked, "the shapes that it takes stay with it"


def test_a_kernel_asked_for_by_name_leaves_what_it_cannot_do_to_varlen(hopper):
    tensors, _ = draw([256, 256], 2, 1, 8, BF16)
    BACKENDS["cudnn"](*tensors, Segments.of([256, 256]), True, 0.3)  # grouped heads
    BACKENDS["dense"](*tensors, Segments.of([256, 256]), True, 0.3)
    assert hopper.asked == ["varlen", "dense"]


# ---- what is installed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "word"), [("flash_3", "hopper/"), ("flash_4", "flash-attn-4"), ("flash_attn", "--no-build-isolation")]
)
def test_a_package_that_is_absent_is_named_with_its_remedy(name, word, monkeypatch):
    monkeypatch.setattr(rule, "is_importable", lambda module: False)
    with pytest.raises(UserError, match=f"--attention {name}: needs .*{word}.* not installed.*--attention varlen"):
        check_backend(name)


def test_a_package_that_is_broken_is_told_from_one_that_is_absent(tmp_path, monkeypatch):
    (tmp_path / "flash_attn_interface.py").write_text("raise ImportError('undefined symbol: x')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"flash_3: flash_attn_interface is installed and cannot be loaded \(undefined"):
        check_backend("flash_3")
    assert rule.is_importable("flash_attn_interface")


def test_old_versions_are_not_asked_for_what_they_do_wrong(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "enabled", True)
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: True)
    monkeypatch.setattr(rule, "VERSION", (2, 11))
    assert not rule.why_absent("dense")
    with pytest.raises(UserError, match=r"--attention cudnn: needs torch 2\.14"):
        check_backend("cudnn")
    monkeypatch.setattr(rule, "VERSION", (2, 14))
    assert not rule.why_absent("cudnn")
    monkeypatch.setattr(torch.backends.cudnn, "enabled", False)
    with pytest.raises(UserError, match="--attention dense: cuDNN's attention is switched off"):
        check_backend("dense")


# ---- times ----------------------------------------------------------------------------------------------------------

MODEL = Qwen2VLConfig(
    vision_config={"depth": 2, "num_heads": 2, "embed_dim": 16, "hidden_size": 16},
    text_config={"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 16},
)


def run_of(lengths: list[list[int]], steps: int = 1000) -> tuple[SimpleNamespace, SimpleNamespace]:
    """Sizes and steps of a run whose micro-batches are texts of these lengths."""
    numbers = iter(range(10**6))
    micro_batches = [[next(numbers) for _ in row] for row in lengths]
    tokens = np.array([length for row in lengths for length in row])
    table = SimpleNamespace(size=lambda sample: SimpleNamespace(grids=[]))

    class Planned:
        survey = SimpleNamespace(most=1)

        def __len__(self):
            return steps

        def micro_batches(self):
            return iter(micro_batches)

    return SimpleNamespace(tokens=tokens, table=table), Planned()


@pytest.fixture
def stopwatch(hopper, monkeypatch):
    """Times that kernels are said to take: {kernel: [first, later]}; how many were measured."""
    times = {"varlen": [5.0, 3.0], "dense": [100.0, 1.0], "dense_flash": [5.0, 4.0]}
    measured = []

    def milliseconds(run):
        hopper.asked.clear()
        run()
        name = hopper.asked[0]
        measured.append(name)
        return times[name][measured.count(name) > 1]

    monkeypatch.setattr(fastest, "milliseconds", milliseconds)
    monkeypatch.setattr(fastest, "tells_work_apart", lambda device: True)
    monkeypatch.setattr(fastest, "choose_attention", lambda name, device, dtype: name)
    return SimpleNamespace(times=times, measured=measured)


def choose(config: Config, lengths: list[list[int]], steps: int = 1000) -> str:
    sizes, planned = run_of(lengths, steps)
    fastest.choose_kernels(config, MODEL, CPU, BF16, sizes, planned)
    return rule.known.words


def test_the_fastest_is_measured_once_and_remembered(stopwatch, tmp_path):
    config = Config(cache_dir=str(tmp_path))
    words = choose(config, [[64, 64]] * 100)
    assert words == "auto: language model dense (1.00 ms a layer; varlen 3.00, dense_flash 4.00)"
    assert set(stopwatch.measured) == {"varlen", "dense", "dense_flash"}
    stopwatch.measured.clear()
    assert choose(config, [[64, 64]] * 100) == words
    assert not stopwatch.measured, "measured again"
    choose(config, [[128, 128]] * 100)
    assert stopwatch.measured, "other lengths go by their own times"


def test_a_plan_for_every_new_shape_counts(stopwatch, tmp_path):
    """Dense saves 2 ms in each of 2 layers and takes 99 ms for a new shape: it pays from 25 calls of a shape on."""
    same = [[64, 64]] * 100
    new = [[40 + number % 20, 40 + number % 20] for number in range(100)]
    for name, lengths in (("dense", same), ("varlen", new)):
        assert choose(Config(cache_dir=str(tmp_path)), lengths).startswith(f"auto: language model {name} "), name


def test_what_is_wrong_or_raises_is_never_the_fastest(stopwatch, hopper, tmp_path):
    def raises(*given):
        hopper.asked.append("dense")
        raise RuntimeError("no")

    hopper.kernels["dense"] = replace(hopper.plain, forward=raises)
    stopwatch.times["dense_flash"] = [0.1, 0.1]
    right = hopper.kernels["dense_flash"].forward
    hopper.kernels["dense_flash"] = replace(
        hopper.plain, forward=lambda *given: (2 * right(*given)[0], right(*given)[1])
    )
    assert choose(Config(cache_dir=str(tmp_path)), [[64, 64]] * 100) == "auto: language model varlen"
    assert set(json.loads(next(tmp_path.glob("attention/*.json")).read_text())["times"].popitem()[1]) == {"varlen"}


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[:50],
        lambda text: "[1, 2]",
        lambda text: text.replace('"device": "cpu"', '"device": "another"'),
        lambda text: text.replace('"varlen": [5.0, 3.0]', '"varlen": ["x", 3.0]'),
        lambda text: text.replace('"varlen": [5.0, 3.0]', '"varlen": 3'),
        lambda text: text.replace('"dense_flash": [', '"unheard_of": ['),
        lambda text: text.replace("3.0]", "NaN]"),
    ],
    ids=["empty", "cut", "a list", "foreign", "words", "a number", "unknown kernel", "not a number"],
)
def test_a_damaged_or_foreign_file_is_measured_anew(damage, stopwatch, tmp_path):
    config = Config(cache_dir=str(tmp_path))
    words = choose(config, [[64, 64]] * 100)
    (file,) = tmp_path.glob("attention/*.json")
    sound = file.read_text()
    assert damage(sound) != sound
    file.write_text(damage(sound))
    stopwatch.measured.clear()
    assert choose(config, [[64, 64]] * 100) == words
    assert stopwatch.measured
    assert file.read_text() == sound, "and written anew"


def test_a_folder_that_cannot_be_written_to_stops_nothing(stopwatch, tmp_path):
    (tmp_path / "attention").write_text("a file in its place")
    assert choose(Config(cache_dir=str(tmp_path)), [[64, 64]] * 100).startswith("auto: language model dense (")


@pytest.mark.parametrize("reason", ["a short run", "a clock that stands", "another choice", "no time left"])
def test_nothing_is_measured_where_it_would_not_pay(reason, stopwatch, tmp_path, monkeypatch):
    config = Config(cache_dir=str(tmp_path), attention="dense" if reason == "another choice" else "auto")
    if reason == "a clock that stands":
        monkeypatch.setattr(fastest, "tells_work_apart", lambda device: False)
    if reason == "no time left":
        monkeypatch.setattr(fastest, "SECONDS", 0)
    words = choose(config, [[512, 512]] * 20, steps=10 if reason == "a short run" else 1000)
    expected = (
        "dense: language model dense" if reason == "another choice" else "auto: language model dense (by the rule)"
    )
    assert words == expected
    assert not stopwatch.measured
    assert not rule.known.fastest


def test_measuring_ends_in_time(stopwatch, tmp_path, monkeypatch):
    """Each kind of lengths is said to take 2 of 3 seconds: two are measured, the rest go by the rule."""
    clock = iter(range(0, 100, 2))
    monkeypatch.setattr(fastest.time, "monotonic", lambda: next(clock))
    choose(Config(cache_dir=str(tmp_path)), [[2**power] * 2 for power in range(4, 9)])
    assert len(rule.known.fastest) == 1


def test_the_first_rank_decides_for_all(stopwatch, tmp_path, monkeypatch):
    monkeypatch.setattr(fastest.ranks, "is_first", lambda: False)
    monkeypatch.setattr(fastest.ranks, "from_first", lambda value: ({"its": "dense"}, "its words"))
    assert choose(Config(cache_dir=str(tmp_path)), [[64, 64]] * 100) == "its words"
    assert rule.known.fastest == {"its": "dense"}
    assert not stopwatch.measured


def test_the_lengths_are_those_of_samples_and_of_frames():
    grids = {0: [SimpleNamespace(t=1, h=4, w=6)], 1: [SimpleNamespace(t=3, h=2, w=2), SimpleNamespace(t=1, h=8, w=8)]}
    sizes = SimpleNamespace(
        tokens=np.array([10, 20]), table=SimpleNamespace(size=lambda sample: SimpleNamespace(grids=grids[sample]))
    )
    assert fastest.tokens_of(sizes, [1, 0]) == (20, 10)
    assert fastest.patches_of(sizes, [1, 0]) == (4, 4, 4, 64, 24)


def test_a_cpu_is_not_measured():
    assert not fastest.tells_work_apart(CPU)
    assert packed.capability(CPU) == (0, 0)


# ---- the benchmark --------------------------------------------------------------------------------------------------


def test_the_benchmark_reports_every_kernel_and_outlives_one_that_raises(tmp_path, monkeypatch, capsys):
    from benchmarks import attention as benchmark

    def raises(q, k, v, segments, causal, scale):
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(rule, "is_importable", lambda module: False)
    monkeypatch.setitem(BACKENDS, "raises", raises)
    monkeypatch.setattr(benchmark.attention, "check_backend", lambda name: name == "raises" or check_backend(name))
    monkeypatch.setattr(benchmark, "REPEATS", 1)
    monkeypatch.setattr(benchmark, "WARM_UP", 0)
    out = tmp_path / "attention.json"
    names = ["plain", "raises", "flash_3"]
    monkeypatch.setattr("sys.argv", ["attention.py", "--smoke", "--kernels", *names, "--out", str(out)])
    benchmark.main()
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 3 * 11, "three shapes of the tower and four of each language model"
    for row in rows:
        if row["kernel"] == "raises":
            assert row["failed"] == "RuntimeError: no kernel image"
        elif row["kernel"] == "flash_3":
            assert "not installed" in row["absent"]
        else:
            assert row["difference"] < 1e-5
            assert row["difference_of_gradients"] < 1e-5
            assert min(row[name] for name in ("first_ms", "forward_ms", "both_ms", "tflops")) > 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(rows) + 1
