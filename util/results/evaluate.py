"""Loss on held-out data; answers generated in batches and scored."""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm
from transformers import GenerationConfig

from util import conversation, ranks, vision
from util.collator import Batch, Collator
from util.command_line import UserError
from util.config import Config
from util.cost.measure import QuickSize
from util.data.bad_samples import Lenient, Skipped
from util.data.entries import text_of
from util.data.lines import DataError
from util.data.loader import Loader, usable_cpus
from util.data.media import MediaReader
from util.dataset import Example, Examples, Sample, Samples
from util.guard import Stopped, StopSignal
from util.loss import PackedLoss
from util.model import choose_attention, load_weights, set_attention, whole_weights
from util.results.metrics import METRICS, mean
from util.run_folder import written_whole

BATCH_SIZE = 32  # questions answered at a time while training
MOST_NEW_TOKENS = 64  # longest answer while training


@torch.no_grad()
def evaluate_loss(model: nn.Module, batches: Iterable[Batch], device: torch.device) -> dict[str, float]:
    """Of all the batches, read once: "loss_sum", the cross-entropies of all supervised tokens, "likeliest_tokens", how
    many of these the model held for the likeliest, and `Batch.counts`."""
    model.eval()
    sums, counts = torch.zeros(2, dtype=torch.float64, device=device), Counter(Collator()([]).counts)
    with torch.random.fork_rng(devices=[]):  # a loader draws a seed; training goes on as if it had not
        for batch in batches:
            sums += model.score(batch.to(device)).sum(1)
            counts.update(batch.counts)
    model.train()
    return {"loss_sum": sums[0].item(), "likeliest_tokens": round(sums[1].item()), **counts}


def evaluate_answers(
    model: PackedLoss, held_out: Samples, device: torch.device, config: Config, stop: StopSignal | None = None
) -> dict[str, float | None]:
    """`config.eval_metrics` of what a model in training answers, at most `MOST_NEW_TOKENS` long, to
    `config.eval_samples` questions, the same each time, over all and by kind of sample; {} where that is 0.

    Of several ranks each answers its share, at its own pace, and all get the scores of all. Raises Stopped, on all of
    them, where `stop` asked one to leave.
    """
    if not config.eval_samples:
        return {}
    asked = model, held_out, device, config
    model.eval()
    own = stop.unless_stopped(answer_share, *asked, stop.watch) if stop else answer_share(*asked, iter)
    model.train()
    shares = ranks.gather_on_all(own)
    if any(share is None for share in shares):
        raise Stopped
    answers = [answer for share in shares for answer in share]
    scores = summarise(answers, config.eval_metrics)
    del scores["loss"]  # it weighs questions alike; the evaluation loss is that of all supervised tokens
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


def questions_of(
    examples: Examples, on_bad_sample: str = "stop", shrunk: Mapping[int, vision.Budget] | None = None
) -> list[Example]:
    """Every assistant message is a question: the conversation up to and with it, earlier answers as given. `shrunk`:
    the budgets of samples that are shrunk, by number (Samples.shrunk)."""
    questions, readable, shrunk = [], Lenient(examples, on_bad_sample), shrunk or {}
    for index in range(len(examples)):
        if index in examples.left_out or isinstance(example := readable[index], Skipped):
            continue
        turns = [i for i, message in enumerate(example.messages) if message["role"] == "assistant"]
        for number, turn in enumerate(turns):
            where = example.where + (f", turn {number}" if len(turns) > 1 else "")
            questions.append(Example(example.messages[: turn + 1], where, example.kind, budget=shrunk.get(index)))
    return questions


Prompt = tuple[torch.Tensor, torch.Tensor]  # embeddings (L, D), positions (L, 3)


@dataclass
class Limits:
    """How much is answered at a time, and how long an answer may be."""

    questions: int
    tokens: int  # of the packed row that is read, and of the padded batch that is generated; one question always goes
    new_tokens: int


class Answerer:
    """A model that answers: its vision tower and its loss in packed form, generation under sdpa."""

    def __init__(self, packed: PackedLoss, processor, device: torch.device) -> None:
        self.packed, self.processor, self.device = packed, processor, device
        self.stop = processor.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
        self.generation = GenerationConfig(
            do_sample=False, use_cache=True, eos_token_id=self.stop, pad_token_id=self.stop[1]
        )

    @classmethod
    def load(cls, path: str, processor, device: torch.device, dtype: torch.dtype) -> "Answerer":
        """The model of a checkpoint, for answering only."""
        model = load_weights(path, dtype, device)
        set_attention(model, choose_attention("auto", device, dtype))
        return cls(PackedLoss(model, processor, dtype).to(device).eval(), processor, device)

    @torch.no_grad()
    def read(self, pairs: list[tuple[Sample, Sample]], max_new_tokens: int) -> list[tuple[float, str | Prompt]]:
        """Of each pair (prompt, the same with its reference): the mean cross-entropy of the reference's tokens, and the
        answer; where that is still to be generated, the prompt for `generate`.

        Greedy decoding writes the likeliest token each time. Where every token of a reference is the likeliest after
        those before it, the reference is what would be generated: one forward pass instead of one for each token.
        """
        batch = Collator()([whole for _, whole in pairs])
        there = batch.to(self.device)
        visual = self.packed.visual_tokens(there) if len(batch.vision_position_ids) else None
        losses, likeliest = self.packed.score(there, visual).cpu()
        owner = torch.bucketize(batch.supervised_index, batch.segments.cu_seqlens[1:], right=True)
        rows = self.prompts_of(there, self.packed.embed(there, visual))
        found = []
        for number, (prompt, whole) in enumerate(pairs):
            mine = owner == number
            tokens = list(takewhile(lambda token: token not in self.stop, batch.target_ids[mine].tolist()))
            needed = min(len(tokens) + 1, max_new_tokens)  # the end token too, where there is room for it
            if likeliest[mine][:needed].all():
                answer = self.text(tokens[:max_new_tokens])
            else:  # a copy: a part of the row would keep the whole row
                reference = len(whole.encoded.input_ids) - len(prompt.encoded.input_ids)
                answer = tuple(x[:-reference].clone() for x in rows[number])
            found.append((losses[mine].mean().item(), answer))
        return found

    @torch.no_grad()
    def answers(self, prompts: list[Sample], max_new_tokens: int) -> list[str]:
        """Greedy answers to a batch of prompts, one per prompt, cut at the end token."""
        batch = Collator()(prompts).to(self.device)
        return self.generate(self.prompts_of(batch, self.packed.embed(batch)), max_new_tokens)

    def prompts_of(self, batch: Batch, embeddings: torch.Tensor) -> list[Prompt]:
        """The samples of a packed batch with embeddings (T, D), each by itself."""
        lengths = batch.segments.lengths
        return list(zip(embeddings.split(lengths), batch.position_ids.T.split(lengths), strict=True))

    @torch.no_grad()
    def generate(self, prompts: list[Prompt], max_new_tokens: int) -> list[str]:
        """As `answers`, of prompts whose embeddings are there."""
        model, text = self.packed.model, self.packed.model.config.text_config
        embeddings, mask, positions = self.pad(prompts)
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
        return [self.text(takewhile(lambda token: token not in self.stop, row)) for row in generated.tolist()]

    def text(self, tokens: Iterable[int]) -> str:
        # special tokens stay: the boxes of a grounded answer are written with them
        return self.processor.tokenizer.decode(list(tokens), skip_special_tokens=False)

    def pad(self, prompts: list[Prompt]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Left-padded embeddings (B, L, D), mask (B, L) and the released model's positions (4, B, L)."""
        longest = max(len(embeddings) for embeddings, _ in prompts)
        padded = prompts[0][0].new_zeros(len(prompts), longest, prompts[0][0].shape[1])
        mask = torch.zeros(len(prompts), longest, dtype=torch.int64, device=self.device)
        positions = torch.zeros(4, len(prompts), longest, dtype=torch.int64, device=self.device)
        for number, (embeddings, position_ids) in enumerate(prompts):
            length = len(embeddings)
            padded[number, longest - length :] = embeddings
            mask[number, longest - length :] = 1
            positions[0, number, longest - length :] = torch.arange(length, device=self.device)
            positions[1:, number, longest - length :] = position_ids.T
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


def answer_share(
    model: PackedLoss, held_out: Samples, device: torch.device, config: Config, watch: Callable[[Iterable], Iterable]
) -> list[Answer]:
    """This rank's answers; `watch`: see `answer_all`."""
    questions = questions_of(held_out.examples, config.on_bad_sample, held_out.shrunk)
    rank, size = ranks.rank_and_size()
    most = min(config.eval_samples, len(questions))
    # Not every n-th: where each image has n questions, these are all of one kind.
    chosen = random.Random(0).sample(questions, most)
    own = QuestionSamples(chosen[rank::size], held_out.processor, held_out.budget, held_out.reader)
    title = "answering held-out questions" if rank == 0 else None
    with whole_weights(model):
        answerer = Answerer(model, held_out.processor, device)
        return answer_all(
            answerer, own, BATCH_SIZE, MOST_NEW_TOKENS, title, config.on_bad_sample, config.num_workers,
            config.max_tokens, watch,
        )  # fmt: skip


def answer_all(
    answerer: Answerer,
    questions: QuestionSamples,
    batch_size: int,
    max_new_tokens: int,
    title: str | None,
    on_bad_sample: str = "stop",
    num_workers: int | None = None,
    max_tokens: int = Config.max_tokens,
    watch: Callable[[Iterable], Iterable] = iter,
) -> list[Answer]:
    """Answer every question, in batches of like length; the answers in the order asked. No bar without title. Beside a
    GPU the media are read in `num_workers` processes, by default up to 8; a CPU reads them itself: with a worker it
    takes 1.4 times as long on 2 cores.

    A question whose media cannot be read raises DataError; with `on_bad_sample` "skip" it is said and has no answer.
    `watch` passes the batches on and may raise between two of them, to leave before the end.
    """
    quick = QuickSize(questions)
    sizes = [size_of(quick, index, on_bad_sample) for index in range(len(questions))]
    limits = Limits(batch_size, max_tokens, max_new_tokens)
    batches = batches_of(sizes, limits)
    workers = min(num_workers if num_workers is not None else min(8, usable_cpus()), len(batches))
    workers = workers if answerer.device.type == "cuda" else 0
    loader = Loader(Lenient(questions, on_bad_sample), batch_sampler=batches, collate_fn=list, num_workers=workers)
    losses: dict[int, float] = {}
    texts: dict[int, str] = {}
    waiting: dict[int, Prompt] = {}  # answers to generate, until there is a batch of them
    shown = {"desc": title, "unit": " answers", "dynamic_ncols": True, "leave": False, "disable": title is None}
    with tqdm(total=len(questions), **shown) as bar, torch.random.fork_rng(devices=[]):
        for number, (indices, loaded) in enumerate(zip(batches, watch(loader), strict=True), 1):
            there = {i: pair for i, pair in zip(indices, loaded, strict=True) if not isinstance(pair, Skipped)}
            found = answerer.read(list(there.values()), max_new_tokens) if there else []
            for index, (loss, answer) in zip(there, found, strict=True):
                losses[index] = loss
                (texts if isinstance(answer, str) else waiting)[index] = answer
            while chosen := first_to_generate(waiting, limits, is_last=number == len(batches)):
                answers = answerer.generate([waiting.pop(i) for i in chosen], max_new_tokens)
                texts |= zip(chosen, answers, strict=True)
            bar.update(sum(map(len, batches[:number])) - len(waiting) - bar.n)
    return [answer_of(questions.example(index), texts[index], losses[index]) for index in sorted(texts)]


def batches_of(sizes: list[int], limits: Limits) -> list[list[int]]:
    """Questions by number, the longest first, in packed rows within `limits`."""
    batches: list[list[int]] = []
    tokens = 0
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        is_full = not batches or len(batches[-1]) == limits.questions or tokens + sizes[index] > limits.tokens
        if is_full:
            batches.append([])
            tokens = 0
        batches[-1].append(index)
        tokens += sizes[index]
    return batches


def first_to_generate(waiting: dict[int, Prompt], limits: Limits, is_last: bool) -> list[int]:
    """The numbers of the waiting prompts that are generated next; none where more may join them.

    Every row of a batch is padded to the longest, and grows by the answer.
    """
    chosen: list[int] = []
    longest = 0
    for index, (embeddings, _) in waiting.items():
        longest = max(longest, len(embeddings) + limits.new_tokens)
        if chosen and (len(chosen) == limits.questions or (len(chosen) + 1) * longest > limits.tokens):
            return chosen
        chosen.append(index)
    return chosen if is_last or len(chosen) == limits.questions else []


def size_of(quick: QuickSize, index: int, on_bad_sample: str) -> int:
    """Tokens of a question; 0 for one that will be skipped."""
    try:
        return quick(quick.samples.example(index)).tokens
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
    reference = text_of(question.messages[-1]["content"])
    asked = text_of(question.messages[-2]["content"])
    earlier = [[message["role"], text_of(message["content"])] for message in question.messages[:-2]]
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
    with written_whole(path) as file:
        for line in [{"made_from": made_from}, *map(asdict, answers)]:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


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
