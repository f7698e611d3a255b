"""Answering held-out questions: our evaluation in batches, against `generate` of transformers one question at a time.

    python benchmarks/answers.py --model train_output/latest --data test_data/demonstration/data.jsonl

Both read the same files, use the same weights and the same pixel budget, and decode greedily to the end token. Ours
computes the loss of each reference besides. Questions with videos are left out: there the two differ in positions (see
README.md). The answers are compared, too. Prints a table, and one JSON line last.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from PIL import Image
from tqdm import tqdm

from benchmarks.report import origin, write_result
from util.data.entries import text_of
from util.dataset import Example, load_examples
from util.model import choose_device, choose_dtype, find_model, load_processor, load_weights
from util.results.evaluate import Answerer, QuestionSamples, answer_all, questions_of
from util.vision import Budget


def one_by_one(model, processor, questions: list[Example], max_new_tokens: int) -> list[str]:
    """The usual way: the processor and `generate`, a question at a time."""
    answers = []
    for question in tqdm(questions, "one at a time", unit=" answers", leave=False, disable=None):
        messages, images = [], []
        for message in question.messages[:-1]:
            content = []
            for item in message["content"]:
                if item["type"] == "image":
                    images.append(Image.open(item["image"]).convert("RGB"))
                content.append({"type": item["type"], **({"text": item["text"]} if item["type"] == "text" else {})})
            messages.append({"role": message["role"], "content": content})
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = processor(text=[text], images=images or None, return_tensors="pt").to(model.device)
        made = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        answers.append(processor.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0])
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="train_output/latest", help="a finished run, `tiny`, or a hub name")
    parser.add_argument("--data", nargs="+", default=["test_data/demonstration/data.jsonl"])
    parser.add_argument("--questions", type=int, default=200, help="at most")
    parser.add_argument("--batch_size", type=int, default=32, help="of our evaluation")
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3, help="of both, one after the other")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    arguments = parser.parse_args()
    device = choose_device(arguments.device)
    dtype = choose_dtype("auto", device)
    path = find_model(None if arguments.model == "auto" else arguments.model, device)
    processor = load_processor(path)
    budget = Budget(processor.image_processor.size["shortest_edge"], processor.image_processor.size["longest_edge"])
    found = questions_of(load_examples(arguments.data, processor))
    found = [question for question in found if all(item["type"] == "image" for item in question.media)]
    number = min(arguments.questions, len(found))
    questions = [found[i * len(found) // number] for i in range(number)]
    answerer = Answerer.load(path, processor, device, dtype)
    plain = load_weights(path, dtype, device).eval()
    samples = QuestionSamples(questions, processor, budget)
    ways = {
        "ours": lambda: [answer.answer for answer in answer_all(
            answerer, samples, arguments.batch_size, arguments.max_new_tokens, "in batches")],
        "one at a time": lambda: one_by_one(plain, processor, questions, arguments.max_new_tokens),
    }  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    answers = {}
    if device.type == "cuda":  # kernels are chosen in the first call
        [way() for way in ways.values()]
    for _ in range(arguments.rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            answers[name] = way()
            seconds[name].append(time.perf_counter() - began)
    rates = {name: number / statistics.median(times) for name, times in seconds.items()}
    ratios = [slow / fast for fast, slow in zip(seconds["ours"], seconds["one at a time"], strict=True)]
    same = sum(a.strip() == b.strip() for a, b in zip(*answers.values(), strict=True))
    right = {name: sum(a.strip() == text_of(q.messages[-1]["content"]) for a, q in zip(given, questions, strict=True))
             for name, given in answers.items()}  # fmt: skip
    for name, rate in rates.items():
        print(f"{name:>14}  {rate:8.1f} answers a second, {right[name]} of {number} exact")
    print(f"{'ratio':>14}  {statistics.median(ratios):8.2f}, the same answer to {same} of {number}")
    result = {
        **origin("answers.py", sys.argv[1:]),
        "questions": number,
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "batch_size": arguments.batch_size,
        "answers_per_second": {name: round(rate, 2) for name, rate in rates.items()},
        "seconds": {name: [round(value, 3) for value in times] for name, times in seconds.items()},
        "ratio": round(statistics.median(ratios), 3),
        "same_answers": same,
        "exact": right,
    }
    write_result(result, arguments.out)


if __name__ == "__main__":
    main()
