"""Small random checkpoints of the three families, conversations with real media, and what transformers makes of both.

Nothing of the walk is called here: ids are written word by word, positions token by token, media go through
transformers' processors as they are, and frames are chosen by qwen-vl-utils.
"""

from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import transformers
from PIL import Image
from qwen_vl_utils import vision_process

from tests.samples import assistant, system, text, user

MODEL_TYPES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
PATCH = {"qwen2_vl": 14, "qwen2_5_vl": 14, "qwen3_vl": 16}
DEFAULT_SYSTEM = "You are a helpful assistant."

# Templates of our own words that behave as the published ones (chat_template.json of Qwen/Qwen2.5-VL-3B-Instruct, which
# is that of Qwen2-VL, and of Qwen/Qwen3-VL-4B-Instruct). The latter has no default system message, takes tools and
# their calls by itself, and writes no thoughts. Beside a public copy of the published one it gave the same text for talks
# with and without a system message, tools, calls and several results with pictures (November 2026).
MEDIA = """\
{%- macro written(content) -%}
{%- if content is string -%}{{ content }}{%- else -%}
{%- for item in content -%}
{%- if item.type == 'image' or 'image' in item -%}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- elif item.type == 'video' or 'video' in item -%}{{ '<|vision_start|><|video_pad|><|vision_end|>' }}
{%- elif 'text' in item -%}{{ item.text }}{%- endif -%}
{%- endfor -%}{%- endif -%}
{%- endmacro -%}
"""
TEMPLATE_OF_2_5 = (
    MEDIA
    + """\
{%- for message in messages -%}
{%- if loop.first and message.role != 'system' -%}
{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif -%}
{{ '<|im_start|>' + message.role + '\\n' + written(message.content) + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""
)
TEMPLATE_OF_3 = (
    MEDIA
    + """\
{%- set has_system = messages[0].role == 'system' -%}
{%- if tools -%}
{{ '<|im_start|>system\\n' }}
{%- if has_system -%}{{ written(messages[0].content) + '\\n\\n' }}{%- endif -%}
{{ '# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\n' }}
{{- 'You are provided with function signatures within <tools></tools> XML tags:\\n<tools>' }}
{%- for tool in tools -%}{{ '\\n' + (tool | tojson) }}{%- endfor -%}
{{ '\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments ' }}
{{- 'within <tool_call></tool_call> XML tags:\\n<tool_call>\\n' }}
{{- '{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call><|im_end|>\\n' }}
{%- elif has_system -%}
{{ '<|im_start|>system\\n' + written(messages[0].content) + '<|im_end|>\\n' }}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}
{{ '<|im_start|>user\\n' + written(message.content) + '<|im_end|>\\n' }}
{%- elif message.role == 'assistant' -%}
{{ '<|im_start|>assistant\\n' + written(message.content or '') }}
{%- for call in message.tool_calls or [] -%}
{%- if not loop.first or message.content -%}{{ '\\n' }}{%- endif -%}
{{ '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- (call.function.arguments | tojson) + '}\\n</tool_call>' }}
{%- endfor -%}
{{ '<|im_end|>\\n' }}
{%- elif message.role == 'tool' -%}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}{{ '<|im_start|>user' }}{%- endif -%}
{{ '\\n<tool_response>\\n' + written(message.content) + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}{{ '<|im_end|>\\n' }}{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""
)


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def make_checkpoint(folder: Path, model_type: str, tokenizer, tied: bool) -> Path:
    """A small random model in float32 with its processor, in the published format."""
    torch.manual_seed(7)
    config = config_of(model_type, tokenizer, tied)
    model = transformers.AutoModelForImageTextToText.from_config(config).float()
    with torch.no_grad():
        for (
            weight
        ) in model.parameters():  # as they come, norms and biases are ones and zeros: a missing one is not seen
            if weight.ndim > 1:
                weight.mul_(3.0)
            else:
                weight.add_(torch.randn_like(weight) * 0.1)
    model.save_pretrained(folder)
    processor_of(model_type, tokenizer).save_pretrained(folder)
    return folder


def config_of(model_type: str, tokenizer, tied: bool):
    """Several merges of windows, three deepstack mergers, and a head that is not as wide as width over heads."""
    token_id = tokenizer.convert_tokens_to_ids
    text_config = {
        "vocab_size": -(-len(tokenizer) // 64) * 64,
        "hidden_size": 32,
        "intermediate_size": 80,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
    }
    tower = {"depth": 4, "num_heads": 4, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32}
    if model_type == "qwen2_vl":
        tower = {"depth": 3, "num_heads": 4, "embed_dim": 32, "hidden_size": 32}
    if model_type == "qwen2_5_vl":
        tower |= {"tokens_per_second": 2, "window_size": 112, "fullatt_block_indexes": [1, 3]}
    if model_type == "qwen3_vl":
        rotation = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
        text_config |= {"head_dim": 16, "rope_parameters": rotation}
        tower |= {"depth": 5, "num_position_embeddings": 24**2, "deepstack_visual_indexes": [0, 2, 3]}
    return transformers.CONFIG_MAPPING[model_type](
        text_config=text_config,
        vision_config=tower,
        tie_word_embeddings=tied,
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
    )


def processor_of(model_type: str, tokenizer):
    """A processor with the published patches, means and budgets (preprocessor_config.json of each family)."""
    image = transformers.Qwen2VLImageProcessor()
    if model_type != "qwen3_vl":
        kind = {"qwen2_vl": transformers.Qwen2VLProcessor, "qwen2_5_vl": transformers.Qwen2_5_VLProcessor}[model_type]
        return kind(image, tokenizer, transformers.Qwen2VLVideoProcessor(), chat_template=TEMPLATE_OF_2_5)
    half = [0.5, 0.5, 0.5]
    size = {"shortest_edge": 256**2, "longest_edge": 4096**2}
    image = transformers.Qwen2VLImageProcessor(patch_size=16, size=size, image_mean=half, image_std=half)
    video = transformers.Qwen3VLVideoProcessor(size={"shortest_edge": 4096, "longest_edge": 24576 * 32**2})
    return transformers.Qwen3VLProcessor(image, tokenizer, video, chat_template=TEMPLATE_OF_3)


# ---- conversations ---------------------------------------------------------------------------------------------------


def conversations(folder: Path, patch: int, picture, write_video) -> tuple[list[list[dict]], dict[str, float]]:
    """Messages of seven kinds, and frames per second of their videos. No medium needs resizing; windows of 4 x 4 tokens
    are cut at the right and the lower edge of some."""
    side = 2 * patch
    paths = []
    for number, (rows, columns) in enumerate([(6, 9), (3, 5), (10, 4)]):
        path = folder / f"{number}.png"
        Image.fromarray(picture(rows * side, columns * side, seed=number)).save(path)
        paths.append(str(path))
    one, two, three = ({"type": "image", "image": path} for path in paths)
    slow = [picture(6 * side, 7 * side, seed=number // 4) for number in range(23)]
    longer = [picture(4 * side, 5 * side, seed=10 + number // 4) for number in range(63)]
    clip = write_video(folder / "clip.mp4", slow, 10)  # 2.3 seconds: 2 pairs of frames
    quick = write_video(
        folder / "quick.mp4", longer, Fraction(25, 2)
    )  # at 3 frames a second 7 pairs, 1.44 half seconds apart
    rates = {clip: 10.0, quick: 12.5}
    video = {"type": "video", "video": clip}
    talks = [
        [user("What is two and two?"), assistant("four, as it always was")],
        [user([one, text("What colour?")]), assistant("red and blue")],
        [user([two, three, text("Which is larger?")]), assistant("the second one")],
        [user([video, text("Which way?")]), assistant("to the left")],
        [
            user([text("Look at this:"), {"type": "video", "video": quick, "fps": 3}, text(" What moves?")]),
            assistant("nothing"),
        ],
        [
            system("You answer briefly."),
            user([one, text("What is it?")]),
            assistant("a field"),
            user("Sure?"),
            assistant("Yes,\nsure."),
            user([text("And here "), two]),
            assistant("another"),
        ],
        [
            user([text("Compare "), three, text(" with "), video, text(" please")]),
            assistant("they differ"),
            user("How?"),
            assistant("in length"),
        ],
    ]
    return talks, rates


KINDS = ["text", "one image", "two sizes", "video", "video after text", "several turns", "image and video"]


# ---- what transformers makes of them ---------------------------------------------------------------------------------


def read_media(messages: list[dict], processor, model_type: str, rates: dict[str, float], decode_all):
    """The media of a conversation in their order, as (kind, grid, seconds per pair of frames, times of the pairs), and
    the tensors of pixels that the model takes."""
    found = []
    images = []
    videos = []
    contents = [message["content"] for message in messages if isinstance(message["content"], list)]
    for item in [item for content in contents for item in content]:
        if item["type"] == "image":
            images.append(processor.image_processor([Image.open(item["image"])], return_tensors="pt", do_resize=False))
            found.append(
                SimpleNamespace(kind="image", grid=images[-1]["image_grid_thw"][0].tolist(), step=1.0, times=[])
            )
        elif item["type"] == "video":
            if isinstance(item["video"], list):
                frames = np.stack([np.asarray(Image.open(frame)) for frame in item["video"]])
                rate = 2.0  # that of fetch_video in qwen-vl-utils where nothing else is said
                count = len(frames)
            else:
                frames = decode_all(item["video"])
                rate = rates[item["video"]]
                chosen = {key: value for key, value in item.items() if key == "fps"}
                count = vision_process.smart_nframes(chosen, len(frames), rate)
            indices = np.linspace(0, len(frames) - 1, count).round().astype(int)
            pixels = torch.from_numpy(frames[indices]).permute(0, 3, 1, 2)
            keywords = {"return_tensors": "pt", "do_resize": False, "do_sample_frames": False}
            videos.append(processor.video_processor([pixels], **keywords))
            seconds = 2 / (count / len(frames) * rate)  # second_per_grid_ts of Qwen2.5-VL's processor
            # _calculate_timestamps of Qwen3-VL's processor
            times = [(one / rate + other / rate) / 2 for one, other in zip(indices[::2], indices[1::2], strict=True)]
            step = 2.0 * seconds if model_type == "qwen2_5_vl" else 1.0
            found.append(
                SimpleNamespace(kind="video", grid=videos[-1]["video_grid_thw"][0].tolist(), step=step, times=times)
            )
    inputs = {}
    if images:
        inputs["pixel_values"] = torch.cat([image["pixel_values"] for image in images])
        inputs["image_grid_thw"] = torch.cat([image["image_grid_thw"] for image in images])
    if videos:
        inputs["pixel_values_videos"] = torch.cat([video["pixel_values_videos"] for video in videos])
        inputs["video_grid_thw"] = torch.cat([video["video_grid_thw"] for video in videos])
    return found, inputs


def write_row(messages: list[dict], media: list, tokenizer, model_type: str) -> tuple[list[int], list[int]]:
    """Ids and labels, word by word as the released processors write them; -100 where nothing is learned."""
    ids: list[int] = []
    labels: list[int] = []
    waiting = iter(media)

    def add(words: str, is_learned: bool) -> None:
        new = tokenizer(words, add_special_tokens=False)["input_ids"]
        ids.extend(new)
        labels.extend(new if is_learned else [-100] * len(new))

    def medium_in_words(kind: str) -> str:
        medium = next(waiting)
        t, h, w = medium.grid
        if kind == "image" or model_type != "qwen3_vl":
            return "<|vision_start|>" + f"<|{kind}_pad|>" * (t * h * w // 4) + "<|vision_end|>"
        each = "<|vision_start|>" + "<|video_pad|>" * (h * w // 4) + "<|vision_end|>"
        return "".join(f"<{seconds:.1f} seconds>{each}" for seconds in medium.times)

    prompt = ""
    if messages[0]["role"] != "system" and model_type != "qwen3_vl":
        prompt = f"<|im_start|>system\n{DEFAULT_SYSTEM}<|im_end|>\n"
    for message in messages:
        content = message["content"]
        items = [text(content)] if isinstance(content, str) else content
        words = "".join(item["text"] if item["type"] == "text" else medium_in_words(item["type"]) for item in items)
        prompt += f"<|im_start|>{message['role']}\n"
        if message["role"] == "assistant":
            add(prompt, False)
            add(f"{words}<|im_end|>\n", True)
            prompt = ""
        else:
            prompt += f"{words}<|im_end|>\n"
    return ids, labels


def released_positions(ids: list[int], media: list, tokenizer, model_type: str) -> list[list[int]]:
    """The three positions of each token, by the released rule: what follows a medium goes on after the largest position
    on any axis. `get_rope_index` of transformers 4.57 (Qwen2-VL, Qwen3-VL) and, for Qwen2.5-VL, of 4.49, before seconds
    per pair of frames were cut to whole numbers."""
    pads = tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])
    blocks = []
    for medium in media:
        t, h, w = medium.grid
        is_split = medium.kind == "video" and model_type == "qwen3_vl"
        blocks += [(1, h // 2, w // 2, 1.0)] * t if is_split else [(t, h // 2, w // 2, medium.step)]
    waiting = iter(blocks)
    positions: list[list[int]] = []
    following = 0
    while len(positions) < len(ids):
        if ids[len(positions)] not in pads:
            positions.append([following] * 3)
            following += 1
            continue
        t, rows, columns, step = next(waiting)
        start = following
        for time in range(t):
            for row in range(rows):
                positions += [[start + int(time * step), start + row, start + column] for column in range(columns)]
        following = 1 + max(max(place) for place in positions[-t * rows * columns :])
    assert next(waiting, None) is None, "a medium is left over"
    return positions


def reference_sample(messages, processor, model_type, rates, decode_all) -> tuple[dict, list[list[int]]]:
    """The inputs of transformers' own forward for one conversation, and its positions (T, 3) by the released rule."""
    media, inputs = read_media(messages, processor, model_type, rates, decode_all)
    ids, labels = write_row(messages, media, processor.tokenizer, model_type)
    positions = released_positions(ids, media, processor.tokenizer, model_type)
    inputs["input_ids"] = torch.tensor([ids])
    inputs["labels"] = torch.tensor([labels])
    # Given, as transformers' own rule goes back in time after a long video; the first row is of the mask alone.
    inputs["position_ids"] = torch.tensor([[range(len(ids))], *[[list(axis)] for axis in zip(*positions, strict=True)]])
    return inputs, positions
