"""A server's answers against ours: the comparison itself, and `transformers serve` on a run that was saved."""

import json
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import AutoModelForImageTextToText, AutoProcessor

import finetune
from tests import runs, warm
from tests.samples import assistant, entry, text, user
from util.config import Config

ROOT = Path(__file__).resolve().parent.parent
WAIT = 300  # seconds for a server to come up


@pytest.fixture
def data(tmp_path, picture) -> Path:
    """Two questions about an image, and one without."""
    from PIL import Image

    Image.fromarray(picture(84, 112)).save(tmp_path / "a.png")
    image = {"type": "image", "image": "a.png"}
    rows = [entry(user([image, text(question)]), assistant("red")) for question in ("What is it?", "Where is it?")]
    file = tmp_path / "data.json"
    file.write_text(json.dumps([*rows, entry(user("Hello"), assistant("Hi"))]))
    return file


class Asked(BaseHTTPRequestHandler):
    """Answers each question by the words of its text; a model of another name is refused."""

    answers: dict[str, str]
    requests: list[dict]

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.requests.append(body)
        if body["model"] != "mine":
            self.send_error(404, "no such model")
            return
        (words,) = [item["text"] for item in body["messages"][-1]["content"] if item["type"] == "text"]
        reply = json.dumps({"choices": [{"message": {"content": self.answers[words]}}]}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *words):
        pass


@pytest.fixture
def server():
    """(address, handler) of a server on this machine."""
    handler = type("Handler", (Asked,), {"answers": {}, "requests": []})
    listening = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{listening.server_port}", handler
    listening.shutdown()


def check(url: str, model: Path, data: Path, *more: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "benchmarks/serve_check.py", "--url", url, "--model", str(model), "--data", str(data),
               "--device", "cpu", "--max_new_tokens", "6", *more]  # fmt: skip
    return warm.run(command)


def plain_answers(model: Path, data: Path) -> dict[str, str]:
    """What transformers alone answers, by the words of the question."""
    from PIL import Image

    processor = AutoProcessor.from_pretrained(model)
    plain = AutoModelForImageTextToText.from_pretrained(model, dtype="auto").eval()
    answers = {}
    for sample in json.loads(data.read_text()):
        content = sample["messages"][0]["content"]
        items = [text(content)] if isinstance(content, str) else content
        images = [Image.open(data.parent / item["image"]) for item in items if item["type"] == "image"]
        prompt = processor.apply_chat_template([user(items)], add_generation_prompt=True)
        inputs = processor(text=[prompt], images=images or None, return_tensors="pt")
        made = plain.generate(**inputs, max_new_tokens=6, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        # tiny's random weights may write any token; only the end of the turn is no part of the answer
        answers[items[-1]["text"]] = processor.batch_decode(made)[0].split("<|im_end|>")[0].split("<|endoftext|>")[0]
    return answers


def test_answers_are_counted_as_the_same_or_not(tiny_path, data, server):
    url, handler = server
    handler.answers = plain_answers(tiny_path, data)
    done = check(url, tiny_path, data, "--served", "mine", "--at_least", "1")
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1])["same_as_the_server"]["ours"] == 3
    sent = handler.requests[0]
    assert (sent["temperature"], sent["max_tokens"]) == (0, 6)
    assert sent["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
    handler.answers = {**handler.answers, "Where is it?": "nowhere at all"}
    done = check(url, tiny_path, data, "--served", "mine", "--at_least", "1")
    assert done.returncode == 1, done.stderr[-2000:]
    assert "sample 1: 'nowhere at all', where ours is" in done.stdout
    assert json.loads(done.stdout.splitlines()[-1])["same_as_the_server"]["ours"] == 2


def test_a_server_that_refuses_or_is_not_there_is_one_clear_line(tiny_path, data, server):
    url, _ = server
    for address, name, said in ((url, "yours", "404"), ("http://127.0.0.1:9", "mine", "is the server up?")):
        done = check(address, tiny_path, data, "--served", name)
        assert done.returncode == 2, done.stderr[-2000:]
        assert "Traceback" not in done.stderr
        assert said in done.stderr.strip().splitlines()[-1]


@pytest.mark.slow
@pytest.mark.skipif(
    not (find_spec("fastapi") and find_spec("uvicorn") and find_spec("openai")),
    reason="transformers serve is not installed (pip install 'transformers[serving]')",
)
def test_transformers_serve_answers_as_we_do(tiny_path, tmp_path):
    """A run that has learned the showcase, so that its answers are words and not what random weights say."""
    run = Path(finetune.train(Config(**runs.settings(tiny_path, tmp_path / "run", max_steps=60, epochs=99))))
    program = Path(sys.executable).parent / "transformers"
    port = "8193"
    serving = subprocess.Popen([program, "serve", str(run), "--device", "cpu", "--port", port])
    try:
        until = time.monotonic() + WAIT
        while time.monotonic() < until and serving.poll() is None:
            try:
                urllib.request.urlopen(f"http://localhost:{port}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(1)
        done = check(
            f"http://localhost:{port}", run, ROOT / "train_data" / "data.json", "--served", str(run), "--at_least", "1"
        )
    finally:
        serving.terminate()
        serving.wait()
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
