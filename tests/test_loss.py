"""Forward, loss and gradients of a packed batch against transformers' own forward, one sample at a time, in float32."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import Qwen2VLForConditionalGeneration

from util import head
from util.collator import Collator
from util.config import Config
from util.cost.measure import measure
from util.dataset import Samples, load_examples
from util.model import build_model, prepare_model
from util.packed_layers import rms_norm, rotate_patches
from util.tensors import PARTS, part_of
from util.vision import Budget

CPU = torch.device("cpu")


def write_images(folder, sizes: list[tuple[int, int]]) -> list[str]:
    """Noise images of (height, width) in multiples of 28, which no processor needs to resize."""
    random, paths = np.random.default_rng(1), []
    for number, (height, width) in enumerate(sizes):
        path = folder / f"{number}.png"
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
        paths.append(str(path))
    return paths


@pytest.fixture(scope="module")
def conversations(tmp_path_factory) -> list[list[dict]]:
    """Text, an image, two images, a video of four frames, an image and a video: answers of unequal length."""
    images = write_images(tmp_path_factory.mktemp("media"), [(56, 84), (112, 56), (84, 84), (56, 56)])
    frames = write_images(tmp_path_factory.mktemp("frames"), [(56, 84)] * 4)

    def image(number: int) -> dict:
        return {"type": "image", "image": images[number]}

    video = {"type": "video", "video": frames}
    asked = [
        ("What is two and two?", "four, as it always was and will be"),
        ([image(0), {"type": "text", "text": "What colour?"}], "red"),
        ([image(1), image(2), {"type": "text", "text": "Which is larger?"}], "the second one"),
        ([video, {"type": "text", "text": "Which way does it move?"}], "left"),
        (
            [{"type": "text", "text": "Compare "}, image(3), {"type": "text", "text": " with "}, video],
            "they differ, clearly",
        ),
    ]
    return [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in asked]


@pytest.fixture(scope="module")
def samples(conversations, processor, tmp_path_factory) -> Samples:
    import json

    file = tmp_path_factory.mktemp("data") / "data.json"
    file.write_text(json.dumps([{"messages": messages} for messages in conversations]))
    return Samples(load_examples([str(file)], processor), processor, Budget(min_pixels=3136))


def transformers_inputs(messages: list[dict], processor) -> dict:
    """What transformers' processor makes of a conversation, the answer of its last message as labels."""
    pictures, videos = [], []
    for message in messages:
        for item in message["content"] if isinstance(message["content"], list) else []:
            if item["type"] == "image":
                pictures.append(Image.open(item["image"]))
            elif item["type"] == "video":
                videos.append(
                    np.stack([np.asarray(Image.open(frame)) for frame in item["video"]]).transpose(0, 3, 1, 2)
                )
    media = {}
    if pictures:
        media["images"] = pictures
    if videos:
        media["videos"] = [torch.from_numpy(video) for video in videos]
        media["videos_kwargs"] = {
            "size": {"shortest_edge": 3136, "longest_edge": 602112},
            "cap_pixels_per_frame": False,
        }
    lengths = []
    for upto, extra in ((messages[:-1], {"add_generation_prompt": True}), (messages, {})):
        text = processor.apply_chat_template(upto, tokenize=False, **extra)
        inputs = processor(text=[text], return_tensors="pt", **media)
        lengths.append(inputs["input_ids"].shape[1])
    labels = inputs["input_ids"].clone()
    labels[:, : lengths[0]] = -100
    return {**inputs, "labels": labels}


@pytest.fixture(scope="module")
def reference(conversations, tiny_path, processor) -> dict:
    """Logits, loss and gradients by transformers' own forward, sample by sample."""
    model = Qwen2VLForConditionalGeneration.from_pretrained(tiny_path, dtype=torch.float32)
    logits, loss, tokens = [], 0.0, 0
    for messages in conversations:
        inputs = transformers_inputs(messages, processor)
        outputs = model(**inputs)
        supervised = inputs["labels"][0, 1:] != -100
        count = int(supervised.sum())
        logits.append(outputs.logits[0, :-1][supervised].detach())
        (outputs.loss * count).backward()
        loss, tokens = loss + outputs.loss.item() * count, tokens + count
    gradients = {name: parameter.grad / tokens for name, parameter in model.named_parameters()}
    return {"logits": logits, "loss": loss / tokens, "tokens": tokens, "gradients": gradients}


def packed_gradients(model: nn.Module, samples: Samples, groups: list[list[int]]) -> tuple[float, int, dict]:
    """Loss and gradients of groups of samples, each group packed into one row."""
    model.zero_grad()
    batches = [Collator()([samples[i] for i in group]) for group in groups]
    tokens, total = sum(len(batch.target_ids) for batch in batches), 0.0
    for batch in batches:
        loss = model(batch)
        (loss / tokens).backward()
        total += loss.item()
    gradients = {name.removeprefix("model."): p.grad for name, p in model.named_parameters() if p.grad is not None}
    return total / tokens, tokens, gradients


def worst(ours: dict, theirs: dict) -> tuple[float, str]:
    """The largest gap between two sets of gradients, and where."""
    assert ours.keys() == theirs.keys(), set(ours) ^ set(theirs)
    assert ours, "no gradients to compare"
    return max(((ours[name] - theirs[name]).abs().max().item(), name) for name in ours)


@pytest.mark.parametrize("groups", [[[0, 1, 2, 3, 4]], [[0], [1], [2], [3], [4]], [[4, 0], [3, 1, 2]]])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_loss_and_every_gradient_equal_transformers(groups, checkpointing, samples, tiny_path, processor, reference):
    config = Config(device="cpu", dtype="float32", activation_checkpointing=checkpointing)
    model = build_model(config, str(tiny_path), processor, CPU)
    loss, tokens, gradients = packed_gradients(model, samples, groups)
    assert tokens == reference["tokens"]
    assert loss == pytest.approx(reference["loss"], abs=1e-5)
    gap, where = worst(gradients, reference["gradients"])
    assert gap < 1e-5, f"gradient of {where} is off by {gap}"
    assert max(gradient.abs().max() for gradient in gradients.values()) > 1e-2, "gradients too small to tell anything"


def test_logits_equal_transformers(samples, tiny_path, processor, reference):
    model = build_model(Config(device="cpu", dtype="float32"), str(tiny_path), processor, CPU).eval()
    batch = Collator()([samples[i] for i in range(5)])
    with torch.no_grad():
        logits = model.model.lm_head(model.supervised_rows(batch, *model.embed(batch)))
    torch.testing.assert_close(logits, torch.cat(reference["logits"]), atol=1e-5, rtol=0)


def test_loss_in_chunks_is_the_same(samples, tiny_path, processor, reference, monkeypatch):
    monkeypatch.setattr("util.loss.LOGIT_ROWS", 7)
    model = build_model(Config(device="cpu", dtype="float32"), str(tiny_path), processor, CPU)
    loss, _, gradients = packed_gradients(model, samples, [[0, 1, 2, 3, 4]])
    assert loss == pytest.approx(reference["loss"], abs=1e-5)
    gap, where = worst(gradients, reference["gradients"])
    assert gap < 1e-5, f"gradient of {where} is off by {gap}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "vocabulary"), [(0, 301), (1, 301), (19, 301), (5, 151_936)])
@pytest.mark.parametrize("learns", ["both", "hidden", "weight"])
def test_the_head_on_a_cpu_equals_torchs_cross_entropy(dtype, rows, vocabulary, learns):
    """Losses and both gradients, each token with a gradient of its own, logits up to a thousand, a target twice."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 16, generator=generator, dtype=dtype)
    hidden[::2] *= 100  # the largest logit has all the probability there, and exp of it would be infinite
    weight = torch.randn(vocabulary, 16, generator=generator, dtype=dtype)
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    targets[1:3] = 7
    targets[::4] = (hidden @ weight.T).argmax(1)[::4]
    of_losses = torch.rand(rows, generator=generator, dtype=dtype)
    found = []
    for loss in (
        head.cross_entropies,
        lambda h, w, target_ids: torch.nn.functional.cross_entropy(h @ w.T, target_ids, reduction="none"),
    ):
        ours = hidden.clone().requires_grad_(learns != "weight")
        matrix = weight.clone().requires_grad_(learns != "hidden")
        losses = loss(ours, matrix, targets)
        losses.backward(of_losses)
        found.append([losses.detach(), ours.grad, matrix.grad])
    tolerance = {"atol": 1e-12, "rtol": 1e-12} if dtype == torch.float64 else {"atol": 1e-4, "rtol": 1e-5}
    for mine, theirs in zip(*found, strict=True):
        assert (mine is None) == (theirs is None), "a gradient that nobody asked for, or none where one was"
        if mine is not None:
            torch.testing.assert_close(mine, theirs, **tolerance)


def test_the_head_is_taken_whole_only_where_it_is_a_plain_matrix_on_a_cpu():
    plain = nn.Linear(8, 32, bias=False)
    hidden = torch.randn(3, 8)
    assert head.takes(plain, hidden)
    assert not head.takes(plain, hidden.bfloat16()), "a loss in bf16 has three digits"
    assert not head.takes(plain, hidden.to("meta"))
    assert not head.takes(nn.Linear(8, 32), hidden)
    assert not head.takes(nn.Sequential(plain), hidden)
    plain.register_forward_hook(lambda layer, inputs, output: 2 * output)  # as rows of new tokens have one
    assert not head.takes(plain, hidden)


@pytest.mark.parametrize("tied", [True, False])
def test_the_gradient_of_the_embedding_is_whole(tied, samples, tiny_path, processor):
    """Tied, rows are added to the head's gradient; of a matrix of its own AdamW could not use rows alone."""
    source = Qwen2VLForConditionalGeneration.from_pretrained(tiny_path, dtype=torch.float64)
    if not tied:
        source.lm_head.weight = nn.Parameter(source.lm_head.weight.detach().clone())
    model = prepare_model(source, Config(device="cpu", dtype="float64"), processor, CPU)
    batch = Collator()([samples[0]])
    model(batch).backward()
    embedding = source.get_input_embeddings().weight
    assert embedding.grad.layout == torch.strided
    seen = torch.zeros(len(embedding), dtype=torch.bool)
    seen[batch.input_ids] = True
    assert embedding.grad[seen].abs().sum(1).min() > 0, "a token that occurs"
    assert bool(embedding.grad[~seen].any()) == tied, "of the others only the head has a gradient"


@pytest.mark.parametrize("frozen", [["vision"], ["vision", "merger"], ["language_model"], ["merger"]])
def test_frozen_parts_have_no_gradient_and_the_others_the_same(frozen, samples, tiny_path, processor, reference):
    config = Config(device="cpu", dtype="float32", freeze=frozen)
    model = build_model(config, str(tiny_path), processor, CPU)
    _, _, gradients = packed_gradients(model, samples, [[0, 1, 2, 3, 4]])
    assert {part_of(name) for name in gradients} == set(PARTS) - set(frozen)
    trained = {n: g for n, g in reference["gradients"].items() if part_of(n) not in frozen}
    gap, where = worst(gradients, trained)
    assert gap < 1e-5, f"gradient of {where} is off by {gap}"


@pytest.mark.parametrize("part", PARTS)
def test_float64_is_exact_all_the_way(part, samples, tiny_path, processor):
    """Along a random direction of a part's weights the loss rises as its gradient says, over a step so small that
    rounding any activation to fp32 would drown the difference."""
    config = Config(device="cpu", dtype="float64")
    model = build_model(config, str(tiny_path), processor, CPU)
    batch = Collator()([samples[index] for index in range(len(samples))])
    model(batch).backward()
    generator, step = torch.Generator().manual_seed(0), 1e-7
    weights = [weight for name, weight in model.named_parameters() if part_of(name) == part]
    ways = [torch.randn(weight.shape, generator=generator, dtype=torch.float64) * weight.std() for weight in weights]
    slope = sum((weight.grad * way).sum().item() for weight, way in zip(weights, ways, strict=True))
    losses = []
    with torch.no_grad():
        for side in (step, -2 * step):
            for weight, way in zip(weights, ways, strict=True):
                weight += side * way
            losses.append(model(batch).item())
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_rotation_is_that_of_transformers(dtype):
    import importlib

    from transformers.models.qwen2_vl import modeling_qwen2_vl

    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(24, 4, 16, generator=generator).to(dtype) for _ in range(2))
    angles = torch.rand(24, 16, generator=generator) * 100
    specification = importlib.util.find_spec(
        modeling_qwen2_vl.__name__
    )  # a fresh copy, as runs in fp64 patch the other
    fresh = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(fresh)
    theirs = fresh.apply_rotary_pos_emb_vision(query, key, angles.cos(), angles.sin())
    for ours, expected in zip(rotate_patches(query, key, angles.cos(), angles.sin()), theirs, strict=True):
        assert ours.dtype == dtype
        assert torch.equal(ours, expected)


def test_a_frozen_tower_builds_no_graph(samples, tiny_path, processor):
    config = Config(device="cpu", dtype="float32", freeze=["vision", "merger"])
    model = build_model(config, str(tiny_path), processor, CPU)
    tokens = model.visual_tokens(Collator()([samples[1]]))
    assert len(tokens) > 0
    assert not tokens.requires_grad


def test_sizes_measured_from_headers_are_those_of_the_batch(samples):
    sizes = measure(samples, 10_000)
    for index, size in enumerate(sizes):
        batch = Collator()([samples[index]])
        assert (size.tokens, size.supervised) == (len(batch.input_ids), len(batch.target_ids))
        assert [tuple(grid[:3]) for grid in size.grids] == [tuple(grid) for grid in sorted_grids(batch, samples[index])]


def sorted_grids(batch, sample) -> list[tuple[int, ...]]:
    """The batch has images first; a sample's own order is that of its media."""
    rows = iter(batch.grid_thw.tolist())
    by_kind = {kind: [next(rows) for m in sample.media if m.is_video == kind] for kind in (False, True)}
    return [tuple(by_kind[medium.is_video].pop(0)) for medium in sample.media]


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
def test_bfloat16_loss_on_the_gpu_is_close_to_float32(samples, tiny_path, processor, reference):
    gpu = torch.device("cuda", 0)
    for dtype, tolerance in (("float32", 1e-3), ("bfloat16", 2e-2)):
        model = build_model(Config(dtype=dtype), str(tiny_path), processor, gpu)
        batch = Collator()([samples[i] for i in range(5)]).pin_memory().to(gpu)
        loss = model(batch)
        (loss / reference["tokens"]).backward()
        assert loss.item() / reference["tokens"] == pytest.approx(reference["loss"], rel=tolerance)
        # the gradients of a step of one pass stay as they are computed (util/optimizer.py)
        assert all(p.grad is not None and p.grad.dtype == getattr(torch, dtype) for p in model.parameters())


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
def test_our_norm_is_that_of_transformers(dtype, bound):
    """In bf16 to a last bit, in which it is nearer to the exact norm: it rounds once where transformers' rounds twice."""
    from transformers.models.qwen2_vl import modeling_qwen2_vl

    generator = torch.Generator().manual_seed(0)
    names = [name for name in vars(modeling_qwen2_vl) if name.endswith("RMSNorm")]
    norm = vars(modeling_qwen2_vl)[names[0]](1536, eps=1e-6)  # the name of the class changed between versions
    norm.weight.data = 1 + 0.3 * torch.randn(1536, generator=generator)
    hidden = 5 * torch.randn(64, 1536, generator=generator)
    norm, hidden = norm.to(dtype), hidden.to(dtype)
    exact = hidden.double() / (hidden.double().square().mean(1, keepdim=True) + 1e-6).sqrt() * norm.weight.double()
    theirs, ours = norm(hidden), rms_norm(norm, hidden)
    assert ours.dtype == dtype
    assert ((ours - theirs).abs() <= bound * theirs.abs() + 1e-7).all()
    assert (ours - exact).abs().mean() <= (theirs - exact).abs().mean() * 1.01


def test_the_gradients_of_our_norm_are_those_of_transformers():
    from transformers.models.qwen2_vl import modeling_qwen2_vl

    name = next(name for name in vars(modeling_qwen2_vl) if name.endswith("RMSNorm"))
    norm = vars(modeling_qwen2_vl)[name](64, eps=1e-6)
    generator = torch.Generator().manual_seed(0)
    norm.weight.data = 1 + 0.3 * torch.randn(64, generator=generator)
    hidden, pull = (torch.randn(32, 64, generator=generator) for _ in range(2))
    hidden.requires_grad_()
    ours = torch.autograd.grad((rms_norm(norm, hidden) * pull).sum(), [hidden, norm.weight])
    theirs = torch.autograd.grad((norm(hidden) * pull).sum(), [hidden, norm.weight])
    for found, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-5)
