"""Loss on held-out data; answers generated in batches and scored."""

import hashlib
import json
from collections import Counter
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import GenerationConfig

from util import conversation, ranks, vision
from util.bad_samples import Lenient, Skipped
from util.collator import Batch, Collator
from util.config import Config, UserError
from util.dataset import Example, Examples, Sample, Samples
from util.lines import DataError
from util.loss import PackedLoss
from util.measure import usable_cpus
from util.media import MediaReader
from util.metrics import METRICS, mean
from util.model import choose_attention, load_weights, set_attention, whole_weights

BATCH_SIZE = 32  # questions answered at a time while training
MOST_NEW_TOKENS = 64  # longest answer while training


@torch.no_grad()
def evaluate_loss(model: nn.Module, loader: DataLoader, device: torch.device) -> dict[str, float]:
    """Of all the loader's batches: "loss_sum", the cross-entropies of all supervised tokens, "likeliest_tokens", how
    many of these the model held for the likeliest, and `Batch.counts`."""
    model.eval()
    sums, counts = torch.zeros(2, dtype=torch.float64, device=device), Counter(Collator()([]).counts)
    with torch.random.fork_rng(devices=[]):  # a loader draws a seed; training goes on as if it had not
        for batch in loader:
            sums += model(batch.to(device), reduction="none").sum(1)
            counts.update(batch.counts)
    model.train()
    return {"loss_sum": sums[0].item(), "likeliest_tokens": round(sums[1].item()), **counts}


def evaluate_answers(
    model: PackedLoss, held_out: Samples, device: torch.device, config: Config
) -> dict[str, float | None]:
    """`config.eval_metrics` of what a model in training answers, at most `MOST_NEW_TOKENS` long, to
    `config.eval_samples` questions spread evenly, over all and by kind of sample; {} where that is 0.

    Of several ranks each answers its share, at its own pace, and all get the scores of all.
    """
    if not config.eval_samples:
        return {}
    questions = questions_of(held_out.examples, config.on_bad_sample)
    rank, size = ranks.rank_and_size()
    most = min(config.eval_samples, len(questions))
    chosen = [questions[i * len(questions) // most] for i in range(most)]
    model.eval()
    with whole_weights(model):
        answerer, title = Answerer(model, held_out.processor, device), "answering held-out questions"
        own = QuestionSamples(chosen[rank::size], held_out.processor, held_out.budget, held_out.reader)
        shown = title if rank == 0 else None
        answers = answer_all(
            answerer, own, BATCH_SIZE, MOST_NEW_TOKENS, shown, config.on_bad_sample, config.num_workers
        )
    model.train()
    answers = [answer for share in ranks.gather(answers) for answer in share]
    scores = summarise(answers, config.eval_metrics)
    kinds = sorted({answer.kind for answer in answers if answer.kind})
    for kind in kinds if len(kinds) > 1 else []:
        of_kind = summarise([answer for answer in answers if answer.kind == kind], config.eval_metrics)
        scores |= {f"{metric}_{kind}": of_kind[metric] for metric in config.eval_metrics}
    return scores


# ---- questions and answers ------------------------------------------------------------------------------------------


@dataclass
class Answer:
    """One question of the test data, what the model answered, and its scores."""

    where: str
    kind: str | None
    question: str
    media: list[dict]  # the image and video items of the conversation so far, as in a data file
    reference: str
    answer: str
    loss: float  # mean cross-entropy of the reference's tokens
    earlier: list[list[str]]  # [role, text] of the messages before the question

    def score(self, metric: str) -> float | None:
        """From 0 to 1; None where the reference is nothing that `metric` measures."""
        return METRICS[metric](self.answer, self.reference)


def questions_of(examples: Examples, on_bad_sample: str = "stop") -> list[Example]:
    """Every assistant message is a question: the conversation up to and with it, earlier answers as given."""
    questions, readable = [], Lenient(examples, on_bad_sample)
    found = (readable[index] for index in range(len(examples)) if index not in examples.left_out)
    for example in (example for example in found if not isinstance(example, Skipped)):
        turns = [i for i, message in enumerate(example.messages) if message["role"] == "assistant"]
        for number, turn in enumerate(turns):
            where = example.where + (f", turn {number}" if len(turns) > 1 else "")
            questions.append(Example(example.messages[: turn + 1], where, example.kind))
    return questions


class Answerer:
    """A model that answers: its vision tower and its loss in packed form, generation under sdpa."""

    def __init__(self, packed: PackedLoss, processor, device: torch.device) -> None:
        self.packed, self.processor, self.device = packed, processor, device
        stop = processor.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
        self.generation = GenerationConfig(do_sample=False, use_cache=True, eos_token_id=stop, pad_token_id=stop[1])

    @classmethod
    def load(cls, path: str, processor, device: torch.device, dtype: torch.dtype) -> "Answerer":
        """The model of a checkpoint, for answering only."""
        model = load_weights(path, dtype, device)
        set_attention(model, choose_attention("auto", device, dtype))
        return cls(PackedLoss(model, processor, dtype).to(device).eval(), processor, device)

    @torch.no_grad()
    def answers_and_losses(
        self, pairs: list[tuple[Sample, Sample]], max_new_tokens: int
    ) -> tuple[list[str], list[float]]:
        """Of pairs (prompt, the same with its reference): what is answered, and the mean cross-entropy of each
        reference's tokens. The vision tower sees their media once."""
        prompts, wholes = zip(*pairs, strict=True)
        batch = Collator()(wholes)
        there = batch.to(self.device)
        visual = self.packed.visual_tokens(there) if len(batch.vision_position_ids) else None
        losses, _ = self.packed(there, reduction="none", visual=visual).cpu()
        owner = torch.bucketize(batch.supervised_index, batch.segments.cu_seqlens[1:], right=True)
        means = [losses[owner == number].mean().item() for number in range(len(wholes))]
        return self.answers(prompts, max_new_tokens, visual), means

    @torch.no_grad()
    def answers(self, prompts: list[Sample], max_new_tokens: int, visual: torch.Tensor | None = None) -> list[str]:
        """Greedy answers to a batch of prompts, one per prompt, cut at the end token. `visual`: as in `prefill`."""
        model, text = self.packed.model, self.packed.model.config.text_config
        embeddings, mask, positions = self.prefill(prompts, visual)
        packed_name, text._attn_implementation = text._attn_implementation, "sdpa"  # packed attention knows no padding
        try:
            self.generation.max_new_tokens = max_new_tokens
            generated = model.generate(
                inputs_embeds=embeddings,
                attention_mask=mask,
                position_ids=positions,
                generation_config=self.generation,
                synced_gpus=False,  # each rank holds all weights and stops when its own answers end
            )
        finally:
            text._attn_implementation = packed_name
        stop = set(self.generation.eos_token_id)
        cut = [list(takewhile(lambda token: token not in stop, row)) for row in generated.tolist()]
        # special tokens stay: the boxes of a grounded answer are written with them
        return self.processor.tokenizer.batch_decode(cut, skip_special_tokens=False)

    def prefill(
        self, prompts: list[Sample], visual: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Left-padded embeddings (B, L, D), mask (B, L) and the released model's positions (4, B, L). `visual`: the
        visual tokens (V, D) where they are known already."""
        batch: Batch = Collator()(prompts).to(self.device)
        embeddings = self.packed.embed(batch, visual)
        lengths = batch.segments.cu_seqlens.diff().tolist()
        longest = max(lengths)
        padded = embeddings.new_zeros(len(lengths), longest, embeddings.shape[1])
        mask = torch.zeros(len(lengths), longest, dtype=torch.int64, device=self.device)
        positions = torch.zeros(4, len(lengths), longest, dtype=torch.int64, device=self.device)
        row = 0
        for number, length in enumerate(lengths):
            padded[number, longest - length :] = embeddings[row : row + length]
            mask[number, longest - length :] = 1
            positions[0, number, longest - length :] = torch.arange(length, device=self.device)
            positions[1:, number, longest - length :] = batch.position_ids[:, row : row + length]
            row += length
        return padded, mask, positions


class QuestionSamples(Samples):
    """Questions by index: (prompt, prompt with its reference supervised)."""

    def __getitem__(self, index: int) -> tuple[Sample, Sample]:
        example = self.example(index)
        pieces = conversation.render(example.messages, self.processor)
        for piece in pieces[:-1]:
            piece.supervised = False  # earlier answers are given, not asked
        media = self._media(example, vision.load)
        prompt, reference = (conversation.encode(part, self.processor) for part in (pieces[:-1], pieces[-1:]))
        whole = replace(
            prompt,
            input_ids=prompt.input_ids + reference.input_ids,
            supervised=prompt.supervised + reference.supervised,
        )
        return Sample(prompt, media, example.where), Sample(whole, media, example.where)


def answer_all(
    answerer: Answerer,
    questions: QuestionSamples,
    batch_size: int,
    max_new_tokens: int,
    title: str | None,
    on_bad_sample: str = "stop",
    num_workers: int | None = None,
) -> list[Answer]:
    """Answer every question, in batches of like length; the answers in the order asked. No bar without title. Beside a
    GPU the media are read in `num_workers` processes, by default up to 8; a CPU reads them itself.

    A question whose media cannot be read raises DataError; with `on_bad_sample` "skip" it is said and has no answer.
    """
    sizes = [size_of(questions, index, on_bad_sample) for index in range(len(questions))]
    order = sorted(range(len(questions)), key=lambda index: -sizes[index])
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    workers = min(num_workers if num_workers is not None else min(8, usable_cpus()), len(batches))
    workers = workers if answerer.device.type == "cuda" else 0
    loader = DataLoader(Lenient(questions, on_bad_sample), batch_sampler=batches, collate_fn=list, num_workers=workers)
    answers: dict[int, Answer] = {}
    shown = {"desc": title, "unit": " answers", "dynamic_ncols": True, "leave": False, "disable": title is None}
    with tqdm(total=len(questions), **shown) as bar, torch.random.fork_rng(devices=[]):
        for indices, loaded in zip(batches, loader, strict=True):
            there = {i: pair for i, pair in zip(indices, loaded, strict=True) if not isinstance(pair, Skipped)}
            if there:
                texts, losses = answerer.answers_and_losses(list(there.values()), max_new_tokens)
                for index, text, loss in zip(there, texts, losses, strict=True):
                    answers[index] = answer_of(questions.example(index), text, loss)
            bar.update(len(indices))
    return [answers[index] for index in sorted(answers)]


def size_of(questions: QuestionSamples, index: int, on_bad_sample: str) -> int:
    """Tokens of a question; 0 for one that will be skipped."""
    try:
        return questions.size(index).tokens
    except DataError:
        if on_bad_sample == "stop":
            raise
        return 0


def ask(answerer: Answerer, messages: list[dict], budget: vision.Budget, max_new_tokens: int) -> str:
    """The answer to one conversation that ends with a user message (content as items, as in a data file)."""
    encoded = conversation.encode(conversation.render_prompt(messages, answerer.processor), answerer.processor)
    try:
        media = MediaReader().each(vision.load, Example(messages, "").media, budget)
    except ValueError as error:
        raise UserError(f"the question: {error}") from None
    return answerer.answers([Sample(encoded, media, "the question")], max_new_tokens)[0]


# ---- scores ---------------------------------------------------------------------------------------------------------


def answer_of(question: Example, text: str, loss: float) -> Answer:
    reference = conversation.text_of(question.messages[-1]["content"])
    asked = conversation.text_of(question.messages[-2]["content"])
    earlier = [[message["role"], conversation.text_of(message["content"])] for message in question.messages[:-2]]
    return Answer(question.where, question.kind, asked, question.media, reference, text, loss, earlier)


def summarise(answers: list[Answer], metrics: list[str]) -> dict[str, float | None]:
    """Means over the answers a metric says something of; the loss weighs every question alike."""
    means = {metric: mean([answer.score(metric) for answer in answers]) for metric in metrics}
    return {"questions": len(answers), **means, "loss": mean([answer.loss for answer in answers])}


# ---- files ----------------------------------------------------------------------------------------------------------


def fingerprint(base: str, data_files: list[str], budget: vision.Budget, max_new_tokens: int) -> dict:
    """What a file of answers was made from; another fingerprint means that it is made anew."""
    data = hashlib.sha256(b"".join(Path(file).read_bytes() for file in data_files)).hexdigest()[:16]
    return {
        "model": base,
        "weights": weights_mark(base),
        "data": data,
        "budget": asdict(budget),
        "max_new_tokens": max_new_tokens,
    }


def weights_mark(base: str) -> str | None:
    """Size and time of a local checkpoint's weights, so that one trained again under the same name is another one."""
    files = sorted(Path(base).glob("*.safetensors")) if Path(base).is_dir() else []
    return " ".join(f"{f.name}:{f.stat().st_size}:{f.stat().st_mtime_ns}" for f in files) or None


def write_answers(path: Path, made_from: dict, answers: list[Answer]) -> None:
    """First line: what the answers were made from; then one answer per line. Complete or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    with open(unfinished, "w", encoding="utf-8") as file:
        for line in [{"made_from": made_from}, *map(asdict, answers)]:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    unfinished.replace(path)


def read_answers(path: Path, made_from: dict) -> list[Answer] | None:
    """The answers in a file, or None where there is none or it was made from something else."""
    try:
        known, answers = read_file(path)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return answers if known == made_from else None


def read_file(path: Path) -> tuple[dict, list[Answer]]:
    """What the answers in a file were made from, and the answers.

    Raises OSError, ValueError, KeyError or TypeError over a file that this version did not write.
    """
    with open(path, encoding="utf-8") as file:  # its lines end with \n alone: an answer may hold other line ends
        made_from = json.loads(next(file, ""))["made_from"]
        return made_from, [Answer(**json.loads(line)) for line in file]
