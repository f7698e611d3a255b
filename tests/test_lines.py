"""Data files of any size: opened fast, read line by line, in little memory."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from util.data.lines import JsonLines, open_entries
from util.dataset import DataError, Examples

ROOT = Path(__file__).resolve().parent.parent


def test_lines_are_those_that_python_finds(tmp_path):
    file = tmp_path / "a.jsonl"
    lines = [{"n": n, "text": "ü" * (n % 50) + "\u2028"} for n in range(3000)]
    for newline in ("\n", "\r\n"):
        for end in ("", newline, newline * 3 + "  " + newline):
            text = newline.join(json.dumps(line, ensure_ascii=False) + (newline + " " if n % 7 == 0 else "")
                                for n, line in enumerate(lines)) + end  # fmt: skip
            for mark in (b"", b"\xef\xbb\xbf"):
                file.write_bytes(mark + text.encode())
                entries = JsonLines(str(file))
                assert list(entries) == lines
                assert entries[-1] == lines[-1]
                assert pickle.loads(pickle.dumps(entries))[17] == lines[17]
    file.write_bytes(b"")
    assert len(JsonLines(str(file))) == 0


def test_line_ends_at_the_border_of_a_chunk(tmp_path, monkeypatch):
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(str(n) for n in range(500)))
    for chunk in (1, 2, 3, 7, 64):
        monkeypatch.setattr("util.data.lines.CHUNK", chunk)
        assert list(JsonLines(str(file))) == list(range(500))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n\n{"a": \n', "line 3: not valid JSON"),
        (b'{"a": 1}\n{"a": "\xff"}\n', "not UTF-8 text \\(byte 16\\)"),
    ],
)
def test_a_broken_line_is_named(content, message, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(content)
    entries = open_entries(str(file))
    assert entries[0] == {"a": 1}
    with pytest.raises(DataError, match=message):
        entries[1]


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_data_workers_read_lines_themselves(context, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(json.dumps({"n": n}) for n in range(64)))
    entries = JsonLines(str(file))
    assert entries[3] == {"n": 3}, "the file is open here before the workers start"
    loader = DataLoader(entries, batch_size=8, num_workers=2, multiprocessing_context=context)
    assert torch.cat([batch["n"] for batch in loader]).tolist() == list(range(64))


MEASURE = """
import random, sys, time
sys.path.insert(0, {root!r})
from util.dataset import Examples
from util.model import load_processor
processor = load_processor({model!r})
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 1e6
before, began = resident(), time.perf_counter()
examples = Examples([{file!r}], processor)
opened = time.perf_counter() - began
order = examples.order(0, 0)
generator = random.Random(0)
for index in order[:20000]:
    example = examples[index]
    assert example.messages[1]["content"][0]["text"] == f"answer {{index}}", example
print(len(examples), opened, resident() - before)
"""


def test_a_million_conversations_open_fast_in_little_memory(tiny_path, tmp_path):
    """Under 200 MB beyond what the imports take, reading 20,000 of them in random order included."""
    file = tmp_path / "a.jsonl"
    padding = "x" * 400
    with open(file, "w") as handle:
        for n in range(1_000_000):
            handle.write(
                f'{{"messages": [{{"role": "user", "content": "{padding}"}}, '
                f'{{"role": "assistant", "content": "answer {n}"}}]}}\n'
            )
    script = MEASURE.format(root=str(ROOT), model=str(tiny_path), file=str(file))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    count, seconds, megabytes = map(float, done.stdout.split())
    print(
        f"{count:.0f} conversations, {file.stat().st_size / 1e6:.0f} MB: {seconds:.2f} s, {megabytes:.0f} MB resident"
    )
    assert count == 1_000_000
    assert megabytes < 200


def test_examples_of_several_files_in_order(tiny_path, processor, tmp_path):
    def line(n: int) -> dict:
        return {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": str(n)}]}

    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(line(n)) for n in range(3)))
    (tmp_path / "b.json").write_text(json.dumps([line(n) for n in range(3, 5)]))
    examples = Examples([str(tmp_path / "a.jsonl"), str(tmp_path / "b.json")], processor)
    answers = [example.messages[1]["content"][0]["text"] for example in examples]
    assert answers == ["0", "1", "2", "3", "4"]
    assert [example.where.rpartition("/")[2] for example in examples][2:4] == ["a.jsonl, sample 2", "b.json, sample 0"]
    assert examples[-1].where == examples[4].where
    with pytest.raises(IndexError):
        examples[5]


def test_opening_does_not_check_and_asking_does(processor, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"messages": []}\n')
    examples = Examples([str(tmp_path / "a.jsonl")], processor)
    with pytest.raises(DataError, match=r"a\.jsonl, sample 0: a sample is"):
        examples[0]
