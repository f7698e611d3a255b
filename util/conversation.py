"""Messages -> token ids, and which of them are supervised.

What is supervised is marked while the tokens are written: the conversation is rendered once by the processor's own chat
template and cut only where supervision begins or ends. Nothing searches for token ids afterwards.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from util.data.entries import text_of

if TYPE_CHECKING:
    from util.vision import Grid

END_OF_TURN = "<|im_end|>\n"
# Qwen2-VL's grounding marks are text that a user may write; every other special token controls the conversation.
GROUNDING_PREFIXES = ("<|object_ref_", "<|box_", "<|quad_")
# Stands for an assistant's content while the template runs. Private-use characters, refused in the text of data files.
MARK = "\ue000\uf8ff"
VIDEO = re.compile(re.escape("<|vision_start|><|video_pad|><|vision_end|>"))


@dataclass
class Piece:
    """A stretch of rendered text that is supervised as a whole or not at all."""

    text: str
    is_answer: bool  # an assistant's content, and the end of its turn
    weight: float = 1.0  # of an answer: how much each token counts in the loss; 0.0: it is not learned

    @property
    def supervised(self) -> bool:
        return self.is_answer and self.weight > 0


@dataclass
class Encoded:
    """Token ids of one conversation, each image, video or pair of frames (Qwen3-VL) still one placeholder token."""

    input_ids: list[int]
    weights: list[float]  # one per id: what its cross-entropy is multiplied by; 0.0: it is not supervised
    placeholders: list[int]  # indices into input_ids, in the order of the media
    unlearned: int = 0  # tokens of answers that are not supervised

    @property
    def supervised(self) -> list[bool]:
        """One per id: is this token something the assistant has to write, and to learn?"""
        return [weight > 0 for weight in self.weights]


def render(messages: list[dict], processor) -> list[Piece]:
    """Cut a conversation into pieces at supervision boundaries.

    An answer is an assistant's content, `<|im_end|>` and the newline after it. What precedes it is exactly the prompt
    that generation sees. An assistant message may have a `weight`; one of 0.0 is cut like any other, so that the
    tokens do not depend on what is learned.
    """
    # The template runs once, with a mark in place of each answer: what stands between the marks is exactly what the
    # template puts around answers, whatever it is.
    masked = [{**m, "content": MARK} if m["role"] == "assistant" else m for m in messages]
    prompt, *rest = of_template(masked, processor).split(MARK)
    answers = [message for message in messages if message["role"] == "assistant"]
    if len(rest) != len(answers) or not all(text.startswith(END_OF_TURN) for text in rest):
        raise ValueError("the processor's chat template does not end every assistant turn with <|im_end|> and newline")
    pieces = [Piece(prompt, False)]
    for answer, following in zip(answers, rest, strict=True):
        # The end of the turn is learned with the answer: else a tuned model would not know when to stop. Its newline
        # goes with it, so that a boundary of supervision is one of the template's own.
        pieces.append(Piece(text_of(answer["content"]) + END_OF_TURN, True, answer.get("weight", 1.0)))
        if following != END_OF_TURN:
            pieces.append(Piece(following[len(END_OF_TURN) :], False))
    return pieces


def default_system(processor) -> str:
    """What the processor's chat template says as the system where a conversation has no system message; "" for nothing
    (Qwen3-VL)."""
    before = of_template([{"role": "user", "content": MARK}], processor).partition(MARK)[0]
    begin, _, turn = before.partition("<|im_start|>system\n")
    return turn.partition(END_OF_TURN)[0] if not begin else ""


def problem_of_template(processor) -> str:
    """What a chat template has that this loop cannot train, as the end of a sentence; "" for none.

    A Thinking model's begins an answer with `<think>` when it asks for one, and writes answers that are there in
    another way: what is trained would not be what is generated.
    """
    question = {"role": "user", "content": "?"}
    asked = of_template([question], processor, add_generation_prompt=True)
    trained = of_template([question, {"role": "assistant", "content": MARK}], processor).partition(MARK)[0]
    if asked == trained:
        return ""
    return (
        f"has a chat template that asks for an answer by {asked[-40:]!r} and writes one that is there after "
        f"{trained[-40:]!r}, as Thinking models do, whose thoughts this project does not train; take the Instruct model"
    )


def of_template(messages: list[dict], processor, **settings) -> str:
    """A conversation as the processor's own chat template writes it."""
    template = processor.chat_template
    return processor.tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **settings)


def render_prompt(messages: list[dict], processor) -> list[Piece]:
    """The pieces of a conversation that waits for its next answer, as the model saw them in training."""
    return render([*messages, {"role": "assistant", "content": ""}], processor)[:-1]


def with_times(pieces: list[Piece], grids: Sequence["Grid"]) -> list[Piece]:
    """Each video as its pairs of frames, the time of each before it in words, where its grid gives them (Qwen3-VL).

    `grids`: of all media of the conversation, in their order.
    """
    times = iter([grid.times for grid in grids if grid.times])

    def pairs_of_frames(video: re.Match) -> str:
        return "".join([f"<{seconds:.1f} seconds>{video[0]}" for seconds in next(times)])

    if not any(grid.times for grid in grids):
        return pieces
    return [replace(piece, text=VIDEO.sub(pairs_of_frames, piece.text)) for piece in pieces]


def encode(pieces: list[Piece], processor, grids: Sequence["Grid"] = ()) -> Encoded:
    """Tokenise each piece by itself and mark its tokens. `grids`: of the conversation's media.

    Returns ids with one placeholder token for each image or video, or for each pair of frames with a time.
    """
    pieces = with_times(pieces, grids)
    media_ids = (processor.image_token_id, processor.video_token_id)  # read from the checkpoint, never written here
    encoded = Encoded([], [], [])
    for piece in pieces:
        # Apart from its neighbours: no token may lie on both sides of a boundary of supervision.
        ids = processor.tokenizer(piece.text, add_special_tokens=False)["input_ids"]
        start = len(encoded.input_ids)
        encoded.placeholders += [start + offset for offset, token in enumerate(ids) if token in media_ids]
        encoded.input_ids += ids
        encoded.weights += [piece.weight if piece.supervised else 0.0] * len(ids)
        if piece.is_answer and not piece.supervised:
            encoded.unlearned += len(ids)
    return encoded


def control_tokens(processor) -> list[str]:
    """The special tokens that no text of a data file may contain, and the placeholders of images and videos.

    Tokens that were added without being special (`<loc_1>`, `<tool_call>`) are text, which may be trained.
    """
    added = processor.tokenizer.added_tokens_decoder
    media_ids = (processor.image_token_id, processor.video_token_id)
    control = [
        token.content
        for number, token in sorted(added.items())
        if (token.special and not token.content.startswith(GROUNDING_PREFIXES)) or number in media_ids
    ]
    return [MARK, *control]
