"""The usual way to write this training loop, to read beside finetune.py and to measure it against.

It is what most public scripts do, done correctly: transformers' processor pads the samples of a micro-batch to the
longest, the labels are found by searching for the assistant's header, and the model computes the logits of every
position. Weights are fp32 under bf16 autocast on a GPU, attention is sdpa, the loss is the mean of a micro-batch.
"""

from collections.abc import Iterator
from functools import partial

import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

IGNORED = -100


def open_picture(path: str) -> Image.Image:
    return Image.open(path).convert("RGB")


def collate(examples: list[dict], processor) -> dict[str, torch.Tensor]:
    """Samples -> one padded batch with labels."""
    conversations = [example["messages"] for example in examples]
    texts = [processor.apply_chat_template(messages, tokenize=False) for messages in conversations]
    images, videos = [], []
    for messages in conversations:
        for item in (item for message in messages for item in message["content"]):
            if item["type"] == "image":
                images.append(open_picture(item["image"]))
            elif item["type"] == "video":
                videos.append([open_picture(frame) for frame in item["video"]])
    batch = processor(text=texts, images=images or None, videos=videos or None, padding=True, return_tensors="pt")
    return {**batch, "labels": find_labels(batch["input_ids"], processor.tokenizer)}


def find_labels(input_ids: torch.Tensor, tokenizer) -> torch.Tensor:
    """The ids of what assistants write, up to `<|im_end|>` and newline; IGNORED everywhere else. (B, L) both."""
    header = tokenizer.encode("<|im_start|>assistant\n")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    labels = torch.full_like(input_ids, IGNORED)
    for row, ids in enumerate(input_ids.tolist()):
        for start in range(len(ids) - len(header)):
            if ids[start : start + len(header)] == header:
                first = start + len(header)
                last = ids.index(end, first) + 1  # the newline
                labels[row, first : last + 1] = input_ids[row, first : last + 1]
    return labels


def train(
    model: nn.Module,
    processor,
    examples: list[dict],
    steps: list[list[list[int]]],
    learning_rate: float,
    max_grad_norm: float,
    dtype: torch.dtype,
    num_workers: int,
) -> Iterator[float]:
    """Train on `steps`, each a list of micro-batches of indices into `examples`; yields the loss of each step."""
    device = model.device
    loader = DataLoader(
        examples,
        batch_sampler=[micro for step in steps for micro in step],
        collate_fn=partial(collate, processor=processor),
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
    )
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, fused=True)
    model.train()
    batches = iter(loader)
    for step in steps:
        step_loss = torch.zeros((), device=device)
        for _ in step:
            batch = {name: tensor.to(device, non_blocking=True) for name, tensor in next(batches).items()}
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = model(**batch, use_cache=False).loss / len(step)
            loss.backward()
            step_loss += loss.detach()
        torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        yield step_loss.item()
