"""New tokens: actions, classes or coordinates that become one token each (`--new_tokens FILE`).

A model has a row of its embedding, and of its head, for each token. Published models have more rows than tokens: new
tokens take the unused rows first, and rows are added where these end. Each row begins as the mean of the rows of the
pieces that its token was read as before. The rows are trained with all weights; beside adapters they are trained alone
and saved as peft's `trainable_token_indices`.
"""

import unicodedata
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from util.command_line import MOST_TOLD, UserError
from util.conversation import control_tokens

MULTIPLE = 64  # where rows are added there will be a multiple of it, as published models have; kernels are fast on it
ROWS = "new_rows"  # the module of a model that holds the rows which are trained alone
DELTA = "token_adapter.trainable_tokens_delta"  # how peft calls the rows of a layer in its files


class Entry(NamedTuple):
    """A line of a file of new tokens."""

    text: str
    where: str  # file and line number, for messages


@dataclass(frozen=True)
class NewTokens:
    """What a file of tokens means for one model."""

    texts: tuple[str, ...]  # the tokens that have rows to train, in the order of their ids
    ids: tuple[int, ...]
    pieces: dict[int, tuple[int, ...]]  # of each that is new to this model, by its id: what its text was read as
    ordinary: tuple[str, ...]  # in the file, too, but each a token of the vocabulary already, trained or not
    rows_before: int  # of the embedding
    rows: int

    @property
    def known(self) -> tuple[str, ...]:
        """Tokens that an earlier training of this model added: their rows go on from what they are."""
        return tuple(text for text, number in zip(self.texts, self.ids, strict=True) if number not in self.pieces)

    def in_words(self) -> str:
        """`12 new tokens: 12 in unused rows`."""
        added = sum(number >= self.rows_before for number in self.pieces)
        text = f"{len(self.pieces):,} new tokens: {len(self.pieces) - added:,} in unused rows"
        if self.rows > self.rows_before:
            text += f", {added:,} in added ones ({self.rows_before:,} become {self.rows:,}, a multiple of {MULTIPLE})"
        if self.known:
            text += f"; {listed(self.known)} known from an earlier training and trained on"
        if self.ordinary:
            text += f"; {listed(self.ordinary)} one token already, left as it is"
        return text


def listed(texts: tuple[str, ...]) -> str:
    """`3 (up, down, left)`; of many the first."""
    shown = ", ".join(texts[:MOST_TOLD])
    return f"{len(texts):,} ({shown}{', ...' if len(texts) > MOST_TOLD else ''})"


# ---- the file, and what it means for a model -------------------------------------------------------------------------


@cache  # a run goes by what the file was when it began
def read(file: str) -> tuple[Entry, ...]:
    """The tokens in a file, one per line, each once, in composed Unicode (NFC), as Qwen2's tokenizer reads texts.

    Blank lines mean nothing. Raises UserError, which names the lines, where the file or one of them cannot be used.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"--new_tokens {file}: cannot be read ({reason}); name a text file, one token a line") from None
    found: dict[str, Entry] = {}
    problems = []
    for number, line in enumerate(lines, 1):
        text = unicodedata.normalize("NFC", line.removesuffix("\r"))
        where = f"{file}, line {number}"
        if not text.strip():
            continue
        if any(character.isspace() for character in text):
            problems.append(f"{where}: {text!r} has white space in it, which no token may have; take it out")
        found.setdefault(text, Entry(text, where))
    if not found:
        problems.append(f"--new_tokens {file}: there is no token in it; write one per line")
    stop_at(problems)
    return tuple(found.values())


def stop_at(problems: list[str]) -> None:
    """Raise one UserError of all problems, if there are any."""
    if len(problems) > MOST_TOLD:
        problems = [*problems[:MOST_TOLD], f"and {len(problems) - MOST_TOLD:,} more"]
    if problems:
        raise UserError("\n".join(problems))


def of(config, path: str) -> NewTokens | None:
    """What `--new_tokens` of a Config means for the model in `path`; None without that flag."""
    return plan(read(config.new_tokens), path) if config.new_tokens else None


@cache
def plan(entries: tuple[Entry, ...], path: str) -> NewTokens:
    """What tokens mean for the model in `path`, a checkpoint directory or hub name.

    Raises UserError for a control token, and for a text that cannot be one token.
    """
    processor, rows = open_model(path)
    tokenizer = processor.tokenizer
    own = tokenizer.added_tokens_decoder
    before = {entry: tuple(tokenizer(entry.text, add_special_tokens=False)["input_ids"]) for entry in entries}
    chosen = [entry for entry in entries if len(before[entry]) > 1 or is_added(own, before[entry])]
    add(tokenizer, [entry.text for entry in chosen])
    after = {entry: tuple(tokenizer(entry.text, add_special_tokens=False)["input_ids"]) for entry in entries}
    stop_at(cannot_be_tokens(after, processor))
    ids = {after[entry][0]: entry for entry in sorted(chosen, key=lambda entry: after[entry])}
    highest = max(ids, default=0) + 1
    return NewTokens(
        texts=tuple(entry.text for entry in ids.values()),
        ids=tuple(ids),
        pieces={number: before[entry] for number, entry in ids.items() if number not in own},
        ordinary=tuple(entry.text for entry in entries if entry not in chosen),
        rows_before=rows,
        rows=rows if highest <= rows else padded(highest),
    )


def open_model(path: str):
    """The processor of a model, and how many rows its embedding has."""
    from transformers import AutoConfig, AutoProcessor

    try:
        return AutoProcessor.from_pretrained(path), AutoConfig.from_pretrained(path).text_config.vocab_size
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise UserError(f"--model {path}: its processor cannot be loaded ({first_line})") from None


def cannot_be_tokens(read_as: dict[Entry, tuple[int, ...]], processor) -> list[str]:
    """A message for each text that controls the conversation, or that is several tokens although it was added.

    `read_as`: the ids of each text in the vocabulary that it was added to.
    """
    control = control_tokens(processor)
    problems = []
    for entry, ids in read_as.items():
        inside = [token for token in control if token in entry.text]
        if inside:
            problems.append(f"{entry.where}: {entry.text!r} holds the control token {inside[0]!r}; take it out")
        elif len(ids) > 1:
            pieces = " ".join(processor.tokenizer.convert_ids_to_tokens(list(ids)))
            problems.append(f"{entry.where}: {entry.text!r} is always read as {pieces}; write it another way")
    return problems


def is_added(own: dict, ids: tuple[int, ...]) -> bool:
    """Whether this is one token that was added to a vocabulary and is text; `own`: its added_tokens_decoder."""
    return len(ids) == 1 and ids[0] in own and not own[ids[0]].special


def padded(rows: int) -> int:
    """The next multiple of `MULTIPLE`."""
    return -(-rows // MULTIPLE) * MULTIPLE


def add(tokenizer, texts) -> None:
    """Let a tokenizer read these texts as one token each. They are no special tokens: data files may hold them, and
    decoding keeps them."""
    from transformers import AddedToken

    # normalized: a text is composed (NFC) before it is searched for tokens, and these are composed, too
    tokenizer.add_tokens([AddedToken(text, normalized=True, special=False) for text in texts])


def texts_of(config) -> list[str]:
    """The texts in the file of `--new_tokens`, in its order; [] without that flag."""
    return [entry.text for entry in read(config.new_tokens)] if config.new_tokens else []


def refuse_others(config, then: list[str], checkpoint: Path) -> None:
    """Raise UserError where a run that goes on from a checkpoint has other new tokens than that one: `then`, in the
    order of their file. Where the same ones stand in another file, nothing is said."""
    now = texts_of(config)
    if now == then:
        return
    pairs = zip_longest(then, now, fillvalue="none")
    place, was, is_now = next((place, *pair) for place, pair in enumerate(pairs, 1) if pair[0] != pair[1])
    raise UserError(
        f"{checkpoint} was trained with other new tokens: its token {place} was {was}, in --new_tokens "
        f"{config.new_tokens} it is {is_now}. Each has its row in the weights: give the file as it was, or begin a new "
        "run with --model set to the model that this one left"
    )


# ---- rows -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def grow(model, found: NewTokens) -> None:
    """Give each new token its row of embedding and head, in place: the mean of the rows of its pieces."""
    widen(model, found.rows)
    for weight in matrices(model).values():
        wide = torch.promote_types(weight.dtype, torch.float32)
        for number, pieces in found.pieces.items():
            weight[number] = weight[list(pieces)].to(wide).mean(0)


@torch.no_grad()
def widen(model, rows: int) -> None:
    """Let embedding and head have at least `rows` rows, in place.

    Those that no token has are the mean of all others, as transformers makes them: the model finds such a token no
    likelier than any.
    """
    for weight in matrices(model).values():
        missing = rows - len(weight)
        if missing <= 0:
            continue
        wide = torch.promote_types(weight.dtype, torch.float32)
        mean = weight.to(wide).mean(0).to(weight.dtype)
        weight.data = torch.cat([weight.data, mean.expand(missing, -1)])
    rows = len(model.get_input_embeddings().weight)
    model.get_input_embeddings().num_embeddings = rows
    model.lm_head.out_features = rows
    model.config.text_config.vocab_size = rows


def matrices(model) -> dict[str, nn.Parameter]:
    """The embedding, and the head where it is not the same tensor."""
    embedding = model.get_input_embeddings().weight
    head = model.lm_head.weight
    return {"embedding": embedding} if head is embedding else {"embedding": embedding, "head": head}


class NewRows(nn.Module):
    """Rows of embedding and head that are trained, while all others stay as they are.

    They are parameters of their own: no optimizer, weight decay or sharding has to know which rows of a matrix it may
    touch. What embedding and head compute is completed by hooks, so who calls these layers need not know of it either.
    """

    ids: torch.Tensor  # (N,) rising

    def __init__(self, model, ids: tuple[int, ...]) -> None:
        super().__init__()
        self.token_ids = list(ids)  # known also where the model has no memory for its tensors
        weights = matrices(model)
        wide = torch.promote_types(weights["embedding"].dtype, torch.float32)
        self.register_buffer("ids", torch.tensor(ids, device=weights["embedding"].device), persistent=False)
        for name, weight in weights.items():
            self.register_parameter(name, nn.Parameter(weight.detach()[self.ids].to(wide)))
        model.get_input_embeddings().register_forward_hook(self.place_embeddings)
        model.lm_head.register_forward_hook(self.place_logits)

    def place_embeddings(self, layer: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        """The embeddings (..., D) of token ids (...), those of the new tokens by their own rows."""
        (token_ids,) = inputs
        place = torch.searchsorted(self.ids, token_ids).clamp(max=len(self.ids) - 1)
        is_new = self.ids[place] == token_ids
        return torch.where(is_new[..., None], F.embedding(place, self.embedding).to(output.dtype), output)

    def place_logits(self, layer: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        """The logits (..., vocabulary) of hidden states (..., D), those of the new tokens by their own rows."""
        (hidden,) = inputs
        rows = self.head if hasattr(self, "head") else self.embedding
        own = F.linear(hidden, rows.to(hidden.dtype))  # (..., N)
        # in place: a copy of all logits would be the largest tensor of a step
        return output.index_copy_(-1, self.ids, own.to(output.dtype))


def train_rows(model, found: NewTokens) -> None:
    """Train the rows of new tokens alone, beside adapters. They are kept in fp32 (fp64 on request)."""
    if not found.ids:  # all are tokens of the vocabulary already
        return
    setattr(model, ROWS, NewRows(model, found.ids))


def is_row(name: str) -> bool:
    """Whether a parameter is of rows that are trained alone."""
    return f".{ROWS}." in f".{name}"


def count_rows(model_config, config) -> int:
    """Parameters of the rows that are trained alone: none without adapters, where all weights are trained."""
    found = of(config, model_config._name_or_path) if config.lora_rank else None
    if found is None:
        return 0
    return len(found.ids) * model_config.text_config.hidden_size * (1 if model_config.tie_word_embeddings else 2)


# ---- peft's files ---------------------------------------------------------------------------------------------------


def rows_for_peft(model, weights: dict) -> tuple[dict[str, torch.Tensor], list[int] | dict[str, list[int]] | None]:
    """The rows among `weights`, which are whole tensors by name, as peft's file names them, and what its config says of
    them (`trainable_token_indices`): nothing, or None, where the model has none."""
    rows = getattr(model, ROWS, None)
    if rows is None:
        return {}, None
    ids = rows.token_ids
    saved = {f"model.language_model.embed_tokens.{DELTA}": weights[f"{ROWS}.embedding"]}
    if not hasattr(rows, "head"):
        return saved, ids
    return {**saved, f"lm_head.{DELTA}": weights[f"{ROWS}.head"]}, {"embed_tokens": ids, "lm_head": ids}


@torch.no_grad()
def take_rows(model, settings, weights: dict) -> None:
    """Put the rows of a saved adapter into embedding and head, and take them out of `settings`, its LoraConfig, and of
    `weights`, its tensors by name: what is left are adapters. Raises AttributeError, LookupError or RuntimeError where
    they do not fit."""
    named = settings.trainable_token_indices
    settings.trainable_token_indices = None
    if not named:
        return
    if not isinstance(named, dict):
        named = {"embed_tokens": named}
    of_layer = {name.rpartition(".")[2]: ids for name, ids in named.items()}
    highest = max(max(ids) for ids in named.values()) + 1
    if highest > len(model.get_input_embeddings().weight):
        widen(model, padded(highest))
    for key in [key for key in weights if key.endswith(DELTA)]:
        layer = key.removesuffix(f".{DELTA}")
        ids = torch.tensor(of_layer[layer.rpartition(".")[2]])
        weight = model.get_submodule(layer).weight
        weight[ids.to(weight.device)] = weights.pop(key).to(weight)
