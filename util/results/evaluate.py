"""Loss on held-out data; answers generated in batches and scored."""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, islice, takewhile
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
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
from util.model import choose_attention, forget_forward_passes, load_weights, pack_layers, set_attention, whole_weights
from util.passes import batch_halves, in_halves, in_parts
from util.results.answer_files import Answer
from util.results.metrics import several_kinds, summarise
from util.results.suited import choose, in_words

BATCH_SIZE = 32  # questions answered at a time while training
USUAL_NEW_TOKENS = 64  # longest answer while training, where the references are no longer
MOST_NEW_TOKENS = 256  # where they are: a tool call that is cut off is no call


@torch.no_grad()
def evaluate_loss(model: nn.Module, batches: Iterable[Batch], device: torch.device) -> dict[str, float]:
    """Sums over all batches: `Batch.counts`, and two sums over the supervised tokens.

    "loss_sum": their cross-entropies, each times its weight; "likeliest_tokens": how many of them the model held for
    the likeliest. The batches are read once.
    """

    def sums_of(batch: Batch) -> torch.Tensor:
        there = batch.to(device)
        losses, likeliest = model.score(there)
        return torch.stack([(losses * there.target_weights).sum(), likeliest.sum()])

    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    counts = Counter(Collator()([]).counts)  # all keys are there, even if there is no batch
    with torch.random.fork_rng(devices=[]):  # a loader draws a seed, and training's generator must not move
        for batch in ahead(batches, getattr(model, "rows_at_once", 1)):
            for of_part in in_parts(sums_of, batch, batch_halves):
                sums += of_part
            counts.update(batch.counts)
    model.train()
    forget_forward_passes(model)
    return {"loss_sum": sums[0].item(), "likeliest_tokens": round(sums[1].item()), **counts}


def ahead(batches: Iterable[Batch], count: int) -> Iterator[Batch]:
    """The batches, of which so many are read together before the first of them is handed out."""
    batches = iter(batches)
    while some := list(islice(batches, count)):
        yield from some


def evaluate_answers(
    model: PackedLoss, held_out: Samples, device: torch.device, config: Config, stop: StopSignal | None = None
) -> dict[str, float | None]:
    """Scores, by `config.eval_metrics`, of the answers of a model in training, over all and by kind of sample.

    The `config.eval_samples` questions are the same each time, and answers at most `room_for` long; {} where no
    questions are asked. Each rank answers its share at its own pace, and all get the scores of all. Raises Stopped, on
    all ranks, where `stop` asked one to leave.
    """
    if not config.eval_samples:
        return {}
    model.eval()
    if stop:
        own = stop.unless_stopped(answer_share, model, held_out, device, config, stop.watch)
    else:
        own = answer_share(model, held_out, device, config, iter)
    model.train()
    shares = ranks.gather_on_all(own)
    if any(share is None for share in shares):
        raise Stopped
    answers = list(chain.from_iterable(shares))
    metrics = choose(config.eval_metrics, [(answer.kind, answer.reference) for answer in answers]).metrics
    scores = summarise(answers, metrics)
    del scores["loss"]  # a mean over questions, where the evaluation loss is a mean over supervised tokens
    for kind in several_kinds(answer.kind for answer in answers):
        of_kind = summarise([answer for answer in answers if answer.kind == kind], metrics)
        scores |= {f"{metric}_{kind}": of_kind[metric] for metric in metrics}
    return scores


# ---- questions and answers ------------------------------------------------------------------------------------------


def questions_of(
    examples: Examples, on_bad_sample: str = "stop", shrunk: Mapping[int, vision.Budget] | None = None
) -> list[Example]:
    """A question for every answer that is learned: the conversation up to and with it, with the data's earlier answers.

    `shrunk`: the budgets of samples that are shrunk, by number (Samples.shrunk).
    """
    questions = []
    readable = Lenient(examples, on_bad_sample)
    shrunk = shrunk or {}
    for index in range(len(examples)):
        if index in examples.left_out or isinstance(example := readable[index], Skipped):
            continue
        turns = [place for place, message in enumerate(example.messages) if is_learned(message)]
        for number, turn in enumerate(turns):
            where = f"{example.where}, turn {number}" if len(turns) > 1 else example.where
            questions.append(Example(example.messages[: turn + 1], where, example.kind, budget=shrunk.get(index)))
    return questions


def is_learned(message: dict) -> bool:
    """Whether a message is an answer that is learned: one that is not may be wrong, and is no reference."""
    return message["role"] == "assistant" and message.get("weight", 1.0) > 0


# The embeddings and what the first K layers add to them (L, 1 + K, D; see loss.py), positions (L, 3)
Prompt = tuple[torch.Tensor, torch.Tensor]


@dataclass
class Limits:
    """How much is answered at a time, and how long an answer may be."""

    questions: int
    tokens: int  # in a packed row that is read, and in a padded batch that is generated; one question is always allowed
    new_tokens: int


class Answerer:
    """A model that answers. Prompts are read in packed rows, as in training; answers are generated under sdpa."""

    def __init__(self, packed: PackedLoss, processor, device: torch.device) -> None:
        self.packed = packed
        self.collate = Collator(packed.model.config.model_type)
        self.processor = processor
        self.device = device
        self.stop = processor.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
        self.generation = GenerationConfig(
            do_sample=False, use_cache=True, eos_token_id=self.stop, pad_token_id=self.stop[1]
        )

    @classmethod
    def load(cls, path: str, processor, device: torch.device, dtype: torch.dtype) -> "Answerer":
        """The model of a checkpoint, for answering only."""
        model = load_weights(path, dtype, device)
        set_attention(model, choose_attention("auto", device, dtype))
        pack_layers(model)
        return cls(PackedLoss(model, processor, dtype).to(device).eval(), processor, device)

    @torch.no_grad()
    def read(self, pairs: list[tuple[Sample, Sample]], max_new_tokens: int) -> list[tuple[float, str | Prompt]]:
        """Read pairs (prompt, the same with its reference); for each the mean cross-entropy of the reference's tokens,
        and the answer or, where it is still to be generated, the prompt for `generate`.

        Greedy decoding writes the likeliest token each time. Where every token of a reference is the likeliest after
        those before it, the reference is what would be generated: one forward pass instead of one for each token.
        """
        batch = self.collate([whole for _, whole in pairs])
        there = batch.to(self.device)
        visual = self.packed.visual_tokens(there) if len(batch.visual_index) else None
        losses, likeliest = self.packed.score(there, visual).cpu()
        owner = torch.bucketize(batch.supervised_index, batch.segments.cu_seqlens[1:], right=True)
        rows = self.prompts_of(there, visual)
        found = []
        for number, (prompt, whole) in enumerate(pairs):
            is_own = owner == number
            tokens = self.before_end(batch.target_ids[is_own].tolist())
            needed = min(len(tokens) + 1, max_new_tokens)  # the end token, too, where there is room for it
            if likeliest[is_own][:needed].all():
                answer = self.text(tokens[:max_new_tokens])
            else:
                reference = len(whole.encoded.input_ids) - len(prompt.encoded.input_ids)
                embeddings, positions = rows[number]
                # Copies: a view would keep the memory of the whole packed row.
                answer = embeddings[:-reference].clone(), positions[:-reference].clone()
            found.append((losses[is_own].mean().item(), answer))
        return found

    @torch.no_grad()
    def answers(self, prompts: list[Sample], max_new_tokens: int) -> list[str]:
        """Greedy answers to a batch of prompts, one per prompt, cut at the end token."""
        batch = self.collate(prompts).to(self.device)
        return self.generate(self.prompts_of(batch), max_new_tokens)

    def prompts_of(self, batch: Batch, visual: torch.Tensor | None = None) -> list[Prompt]:
        """The Prompt of each sample of a packed batch; `visual`: its visual tokens, where they are known already."""
        embeddings, deeper = self.packed.embed(batch, visual)
        added = embeddings.new_zeros(len(embeddings), *deeper.shape[1:]).index_copy(0, batch.visual_index, deeper)
        rows = torch.cat([embeddings[:, None], added], dim=1)
        lengths = batch.segments.lengths
        return list(zip(rows.split(lengths), batch.position_ids.T.split(lengths), strict=True))

    @torch.no_grad()
    def generate(self, prompts: list[Prompt], max_new_tokens: int) -> list[str]:
        """As `answers` does, for prompts that are embedded already."""
        model = self.packed.model
        text = model.config.text_config
        (embeddings, *deeper), mask, positions = self.pad(prompts)
        packed_attention = text._attn_implementation
        released = model.generation_config
        text._attn_implementation = "sdpa"  # packed attention cannot handle padding
        # What `self.generation` leaves open transformers takes from the release: of Qwen2.5-VL a penalty on repetition.
        model.generation_config = self.generation
        try:
            self.generation.max_new_tokens = max_new_tokens
            with add_to_prompts(model.model.language_model.layers, deeper):
                generated = model.generate(
                    inputs_embeds=embeddings,
                    attention_mask=mask,
                    position_ids=positions,
                    generation_config=self.generation,
                    synced_gpus=False,  # each rank holds all weights and stops when its own answers end
                )
        finally:
            text._attn_implementation = packed_attention
            model.generation_config = released
        return [self.text(self.before_end(row)) for row in generated.tolist()]

    def before_end(self, tokens: list[int]) -> list[int]:
        """The tokens before the first end token."""
        return list(takewhile(lambda token: token not in self.stop, tokens))

    def text(self, tokens: list[int]) -> str:
        # special tokens stay, as the boxes of an answer are written with them
        return self.processor.tokenizer.decode(tokens, skip_special_tokens=False)

    def pad(self, prompts: list[Prompt]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Left-padded embeddings and what is added to them (1 + K, B, L, D), mask (B, L) and the released model's
        positions (4, B, L)."""
        longest = max(len(embeddings) for embeddings, _ in prompts)
        deepest = max(embeddings.shape[1] for embeddings, _ in prompts)  # a prompt without pictures has one level
        padded = prompts[0][0].new_zeros(deepest, len(prompts), longest, prompts[0][0].shape[2])
        mask = torch.zeros(len(prompts), longest, dtype=torch.int64, device=self.device)
        positions = torch.zeros(4, len(prompts), longest, dtype=torch.int64, device=self.device)
        for number, (embeddings, position_ids) in enumerate(prompts):
            length = len(embeddings)
            begin = longest - length
            padded[: embeddings.shape[1], number, begin:] = embeddings.transpose(0, 1)
            mask[number, begin:] = 1
            positions[0, number, begin:] = torch.arange(length, device=self.device)
            positions[1:, number, begin:] = position_ids.T
        return padded, mask, positions


@contextmanager
def add_to_prompts(layers: nn.ModuleList, deeper: list[torch.Tensor]) -> Iterator[None]:
    """Let the first layers, when they see prompts for the first time, each add its part of `deeper` (B, L, D).

    transformers does so only where it runs the vision tower itself: given embeddings, Qwen3-VL answers without.
    """

    def add_once(layer: Any, added: torch.Tensor) -> RemovableHandle:
        def add(module: nn.Module, inputs: tuple, hidden: torch.Tensor) -> torch.Tensor:
            hook.remove()  # the tokens that are generated after the prompt are no pictures
            return hidden + added

        hook = layer.register_forward_hook(add)
        return hook

    hooks = [add_once(layer, added) for layer, added in zip(layers, deeper, strict=False)]
    try:
        yield
    finally:
        for hook in hooks:  # left over where memory ran out: the same prompts are then answered in halves
            hook.remove()


class QuestionSamples(Samples):
    """Questions by index: (prompt, prompt with its reference supervised)."""

    def __getitem__(self, index: int) -> tuple[Sample, Sample]:
        example = self.example(index)
        pieces = conversation.render(example.messages, self.processor)
        for piece in pieces[:-1]:
            piece.weight = 0.0  # earlier answers are part of the question
        pieces[-1].weight = 1.0  # the answer's own loss is told, whatever it weighs beside others
        media = self._media(example, vision.load)
        prompt = conversation.encode(pieces[:-1], self.processor, [medium.grid for medium in media])
        reference = conversation.encode(pieces[-1:], self.processor)
        whole = replace(
            prompt,
            input_ids=prompt.input_ids + reference.input_ids,
            weights=prompt.weights + reference.weights,
        )
        return Sample(prompt, media, example.where), Sample(whole, media, example.where)


def chosen_questions(held_out: Samples, config: Config) -> list[Example]:
    """The `config.eval_samples` held-out questions that are answered, the same each time."""
    questions = questions_of(held_out.examples, config.on_bad_sample, held_out.shrunk)
    most = min(config.eval_samples, len(questions))
    # At random and not every n-th: where each image has n questions, these would all be of one kind.
    return random.Random(0).sample(questions, most)


def scoring_in_words(held_out: Samples, config: Config) -> str:
    """How many questions an evaluation answers, and by what they are scored, for the plan."""
    questions = chosen_questions(held_out, config)
    choice = choose(config.eval_metrics, references_of(questions, held_out, config.on_bad_sample))
    reason = choice.reason or f"Scored by {in_words(choice.metrics)}."
    return f"{len(questions):,} held-out questions. {reason}"


def references_of(questions: list[Example], held_out: Samples, on_bad_sample: str) -> list[tuple[str | None, str]]:
    """The kind and the reference answer of each question, whose boxes are text; a bad one has none, or stops."""
    references = []
    for question in questions:
        try:
            reference = held_out.with_boxes(question).messages[-1]
        except DataError:
            if on_bad_sample == "stop":
                raise
            continue
        references.append((question.kind, text_of(reference["content"])))
    return references


def answer_share(
    model: PackedLoss, held_out: Samples, device: torch.device, config: Config, watch: Callable[[Iterable], Iterable]
) -> list[Answer]:
    """This rank's answers; `watch`: see `answer_all`."""
    rank, size = ranks.rank_and_size()
    chosen = chosen_questions(held_out, config)
    own = QuestionSamples(chosen[rank::size], held_out.processor, held_out.budget, held_out.reader)
    references = [reference for _, reference in references_of(chosen, held_out, config.on_bad_sample)]
    title = "answering held-out questions" if rank == 0 else None
    with whole_weights(model):
        answerer = Answerer(model, held_out.processor, device)
        return answer_all(
            answerer, own, BATCH_SIZE, room_for(references, held_out.processor), title, config.on_bad_sample,
            config.num_workers, config.max_tokens, watch,
        )  # fmt: skip


def room_for(references: list[str], processor) -> int:
    """How many tokens an answer may have while training: as many as the longest of these references."""
    ended = [reference + conversation.END_OF_TURN for reference in references]
    encoded = processor.tokenizer(ended, add_special_tokens=False)["input_ids"] if ended else []
    return min(MOST_NEW_TOKENS, max(USUAL_NEW_TOKENS, *map(len, encoded), 0))


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
    """Answer every question, in batches of like length; the answers in the order of the questions.

    `title`: of the progress bar; None: no bar. `num_workers`: see `reading_workers`. A question whose media cannot be
    read raises DataError; with `on_bad_sample` "skip" it is named on the error stream and has no answer. `watch` passes
    the batches on and may raise between two of them, to leave before the end.
    """
    limits = Limits(batch_size, max_tokens, max_new_tokens)
    batches = batches_of(sizes_of(questions, on_bad_sample), limits)
    workers = reading_workers(answerer.device, num_workers, len(batches))
    loader = Loader(Lenient(questions, on_bad_sample), batch_sampler=batches, collate_fn=list, num_workers=workers)
    losses: dict[int, float] = {}
    texts: dict[int, str] = {}
    waiting: dict[int, Prompt] = {}  # answers to generate, until there is a batch of them
    bar_options = {"desc": title, "unit": " answers", "dynamic_ncols": True, "leave": False, "disable": title is None}
    with tqdm(total=len(questions), **bar_options) as bar, torch.random.fork_rng(devices=[]):
        for number, (indices, loaded) in enumerate(zip(batches, watch(loader), strict=True), 1):
            pairs = {index: pair for index, pair in zip(indices, loaded, strict=True) if not isinstance(pair, Skipped)}
            found = in_halves(answerer.read, list(pairs.values()), max_new_tokens) if pairs else []
            for index, (loss, answer) in zip(pairs, found, strict=True):
                losses[index] = loss
                if isinstance(answer, str):
                    texts[index] = answer
                else:
                    waiting[index] = answer
            while chosen := first_to_generate(waiting, limits, is_last=number == len(batches)):
                answers = in_halves(answerer.generate, [waiting.pop(index) for index in chosen], max_new_tokens)
                texts |= zip(chosen, answers, strict=True)
            bar.update(sum(map(len, batches[:number])) - len(waiting) - bar.n)
    return [answer_of(questions.example(index), texts[index], losses[index]) for index in sorted(texts)]


def reading_workers(device: torch.device, num_workers: int | None, batches: int) -> int:
    """Processes that read media: with a GPU `num_workers`, by default up to 8.

    On a CPU there are none: with a worker beside it, answering takes 1.4 times as long on 2 cores.
    """
    if device.type != "cuda":
        return 0
    if num_workers is None:
        num_workers = min(8, usable_cpus())
    return min(num_workers, batches)


def batches_of(sizes: list[int], limits: Limits) -> list[list[int]]:
    """The numbers of the questions in batches within `limits`, the longest first."""
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
    """The numbers of the waiting prompts that are generated next; [] while the batch could hold more prompts.

    Every row of a batch is padded to the longest one, and grows by the answer.
    """
    chosen: list[int] = []
    longest = 0
    for index, (embeddings, _) in waiting.items():
        longest = max(longest, len(embeddings) + limits.new_tokens)
        if chosen and (len(chosen) == limits.questions or (len(chosen) + 1) * longest > limits.tokens):
            return chosen
        chosen.append(index)
    return chosen if is_last or len(chosen) == limits.questions else []


def sizes_of(questions: QuestionSamples, on_bad_sample: str) -> list[int]:
    """Tokens of each question; 0 for one that will be skipped."""
    quick = QuickSize(questions)
    sizes = []
    for index in range(len(questions)):
        try:
            sizes.append(quick(questions.example(index)).tokens)
        except DataError:
            if on_bad_sample == "stop":
                raise
            sizes.append(0)
    return sizes


def ask(answerer: Answerer, messages: list[dict], budget: vision.Budget, max_new_tokens: int) -> str:
    """The answer to one conversation that ends with a user message (content as items, as in a data file)."""
    try:
        media = MediaReader().each(vision.load, Example(messages, "").media, budget)
    except ValueError as error:
        raise UserError(f"the question: {error}") from None
    pieces = conversation.render_prompt(messages, answerer.processor)
    encoded = conversation.encode(pieces, answerer.processor, [medium.grid for medium in media])
    return answerer.answers([Sample(encoded, media, "the question")], max_new_tokens)[0]


def answer_of(question: Example, text: str, loss: float) -> Answer:
    """The Answer with this text; `loss`: of the question's reference."""
    reference = text_of(question.messages[-1]["content"])
    asked = text_of(question.messages[-2]["content"])
    earlier = [[message["role"], text_of(message["content"])] for message in question.messages[:-2]]
    return Answer(question.where, question.kind, asked, question.media, reference, text, loss, earlier)
