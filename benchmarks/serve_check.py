"""Does a server answer like the run that it serves? Its answers, over HTTP, against ours and those of transformers.

    vllm serve train_output/my_run --served-model-name my-model
    python benchmarks/serve_check.py --url http://localhost:8000 --model train_output/my_run --served my-model

Any server with OpenAI's chat completions will do: vLLM, SGLang, llama.cpp, `transformers serve`. All decode greedily.
Images travel as PNG inside of the request, so that no pixel is lost; questions with videos are left out, as servers
sample frames by rules of their own. Every answer that is not ours is printed. Prints a table, and one JSON line last.
Exits 1 where fewer than --at_least of the answers are the same.
"""

import argparse
import base64
import io
import json
import sys
import urllib.error
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from PIL import Image
from tqdm import tqdm

from benchmarks.answers import one_by_one
from benchmarks.report import origin, write_result
from util.command_line import UserError, run_command
from util.data.entries import text_of
from util.dataset import Example, load_examples
from util.model import choose_device, choose_dtype, load_processor, load_weights
from util.results.evaluate import Answerer, QuestionSamples, answer_all, questions_of
from util.vision import Budget

PATIENCE = 600  # seconds for one answer: a server may load its model at the first question


def chat(url: str, served: str, question: Example, max_new_tokens: int) -> str:
    """The server's greedy answer. UserError: there is no server, or it refuses the request."""
    messages = [
        {"role": message["role"], "content": [as_sent(item) for item in message["content"]]}
        for message in question.messages[:-1]
    ]
    body = {"model": served, "messages": messages, "temperature": 0, "max_tokens": max_new_tokens}
    address = f"{url.rstrip('/')}/v1/chat/completions"
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as reply:
            return json.load(reply)["choices"][0]["message"]["content"] or ""
    except urllib.error.HTTPError as error:
        said = " ".join(error.read().decode(errors="replace").split())  # often a page of HTML
        raise UserError(f"{address}: {error}: {said[:300]}") from None
    except OSError as error:
        raise UserError(f"{address}: no answer ({error}); is the server up?") from None


def as_sent(item: dict) -> dict:
    """An item of a message as OpenAI's chat completions take it."""
    if item["type"] == "text":
        return item
    file = io.BytesIO()
    Image.open(item["image"]).convert("RGB").save(file, "PNG")
    encoded = base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}}


def choose(data: list[str], processor, most: int) -> list[Example]:
    """At most so many questions without videos, evenly from all that the data files hold."""
    found = questions_of(load_examples(data, processor))
    found = [question for question in found if all(item["type"] == "image" for item in question.media)]
    number = min(most, len(found))
    if not number:
        raise UserError(f"{' '.join(data)}: no question without a video in it")
    return [found[index * len(found) // number] for index in range(number)]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", required=True, help="of the server, such as http://localhost:8000")
    parser.add_argument("--model", required=True, help="the run that it serves: a whole model or an adapter")
    parser.add_argument("--served", required=True, help="the name under which the server has it")
    parser.add_argument("--server", help="which program serves, and its version, to be noted with the result")
    parser.add_argument("--data", nargs="+", default=["test_data/demonstration/data.jsonl"])
    parser.add_argument("--questions", type=int, default=20, help="at most")
    parser.add_argument("--max_new_tokens", type=int, default=16)
    parser.add_argument("--device", default="auto", help="where we and transformers answer")
    parser.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float32"))
    parser.add_argument("--at_least", type=float, default=0.0, help="share of answers that must be as ours")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    return parser


def main() -> None:
    arguments = make_parser().parse_args()
    device = choose_device(arguments.device)
    dtype = choose_dtype(arguments.dtype, device)
    processor = load_processor(arguments.model)
    questions = choose(arguments.data, processor, arguments.questions)
    title = f"asking {arguments.url}"
    served = [
        chat(arguments.url, arguments.served, question, arguments.max_new_tokens)
        for question in tqdm(questions, title, unit=" answers", leave=False, disable=None)
    ]
    edges = processor.image_processor.size
    samples = QuestionSamples(questions, processor, Budget(edges["shortest_edge"], edges["longest_edge"]))
    answerer = Answerer.load(arguments.model, processor, device, dtype)
    made = answer_all(answerer, samples, 32, arguments.max_new_tokens, "answering them here")
    plain = load_weights(arguments.model, dtype, device).eval()
    answers = {
        "the server": served,
        "ours": [answer.answer for answer in made],
        "transformers": one_by_one(plain, processor, questions, arguments.max_new_tokens),
    }
    for question, theirs, ours in zip(questions, served, answers["ours"], strict=True):
        if theirs.strip() != ours.strip():
            print(f"{question.where}: {theirs.strip()!r}, where ours is {ours.strip()!r}")
    references = [text_of(question.messages[-1]["content"]) for question in questions]
    right = {name: equal(given, references) for name, given in answers.items()}
    same = {name: equal(served, answers[name]) for name in ("ours", "transformers")}
    for name, number in right.items():
        print(f"{name:>14}  {number} of {len(questions)} exact")
    print(f"the server's answers are ours in {same['ours']}, those of transformers in {same['transformers']}")
    result = {
        **origin("serve_check.py", sys.argv[1:]),
        "server": arguments.server,
        "questions": len(questions),
        "dtype": str(dtype).removeprefix("torch."),
        "exact": right,
        "same_as_the_server": same,
    }
    write_result(result, arguments.out)
    sys.exit(same["ours"] < arguments.at_least * len(questions))


def equal(ours: list[str], theirs: list[str]) -> int:
    return sum(a.strip() == b.strip() for a, b in zip(ours, theirs, strict=True))


if __name__ == "__main__":
    run_command(main)
