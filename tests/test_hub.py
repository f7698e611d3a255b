"""Pushing to the hub: huggingface_hub itself, against a stand-in of the hub's HTTP interface with faults in it.

What goes through Xet, the hub's newer way for large files, is not tested: it is turned off here, and git-lfs, which the
hub takes as well, carries them.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

import pytest

import finetune
from tests import runs
from tests.hub_server import TOKEN, USER, HubServer
from util.config import Config, parse_arguments
from util.publish import hub_files
from util.publish.settings import HubSettings, invalid_hub_settings

ROOT = Path(__file__).resolve().parent.parent
TEST_DATA = str(ROOT / "test_data" / "data.json")


@pytest.fixture(scope="module")
def run(tiny_path, tmp_path_factory) -> Path:
    """4 steps with checkpoints after 2 and 4."""
    folder = tmp_path_factory.mktemp("secret_folder") / "my_run"
    changes = {"max_steps": 4, "save_every": 2, "epochs": 1, "eval_data": [TEST_DATA], "eval_every": 2}
    return Path(finetune.train(Config(**runs.settings(tiny_path, folder, **changes))))


@pytest.fixture
def hub():
    server = HubServer()
    yield server
    server.close()


def environment(hub: HubServer, patience: float = 5, **changes: str) -> dict[str, str]:
    own = {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HUB_TIMEOUT": str(patience),
           "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1"}  # fmt: skip
    return {**os.environ, **own, **changes}


def push(hub: HubServer, path: Path, expect: int = 0, **changes) -> str:
    done = subprocess.run([sys.executable, "-m", "util", "push", str(path), "my-model"], cwd=ROOT, capture_output=True,
                          text=True, timeout=200, env=environment(hub, **changes))  # fmt: skip
    assert done.returncode == expect, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + (done.stderr if expect == 2 else "")


def train(hub: HubServer, tiny_path: Path, folder: Path, *more: str, **changes) -> subprocess.CompletedProcess:
    values = runs.settings(tiny_path, folder, max_steps=2, epochs=1)
    return subprocess.run([sys.executable, "finetune.py", *runs.flags(values), "--push_to_hub", "my-model", *more], cwd=ROOT,
                          capture_output=True, text=True, timeout=300, env=environment(hub, **changes))  # fmt: skip


UNCHANGED = {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
             "processor_config.json", "preprocessor_config.json", "chat_template.json", "chat_template.jinja",
             "metrics.jsonl", "loss.png", "vocab.json", "merges.txt"}  # fmt: skip


def test_the_bytes_that_arrive_are_those_of_the_files(hub, run):
    said = push(hub, run)
    assert f"pushed my_run to {hub.address}/{USER}/my-model" in said
    files = hub.files("my-model")
    assert set(files) == UNCHANGED | {"README.md", "training_config.json"}, "and nothing of checkpoints/"
    for name in UNCHANGED:
        assert files[name] == (run / name).read_bytes(), name
    assert hub.messages("my-model") == ["Model of my_run"], "one commit"
    assert hub.repositories[f"{USER}/my-model"]["private"]


def test_nothing_of_this_machine_is_published(hub, run, tiny_path):
    push(hub, run)
    own = json.loads((run / "training_config.json").read_text())
    assert own["launched_by"][0] == socket.gethostname()
    assert own["model"] == str(tiny_path)
    files = hub.files("my-model")
    private = [
        socket.gethostname(),
        str(run.parent),
        "secret_folder",
        str(tiny_path.parent),
        str(ROOT),
        os.path.expanduser("~/"),
    ]
    for name in set(files) - {"model.safetensors", "loss.png", "tokenizer.json"}:
        for word in private:
            # a host may be called like a word that stands there anyway; as a JSON value it would be in quotes
            word = f'"{word}"' if word == socket.gethostname() else word
            assert word not in files[name].decode(), f"{name} names {word}"
    published = json.loads(files["training_config.json"])
    assert published["data"] == ["data.json"]
    assert published["learning_rate"] == own["learning_rate"]
    assert not {"launched_by", "output_dir"} & set(published)


def test_the_card_says_how_it_was_made(hub, run):
    from huggingface_hub import ModelCard

    push(hub, run)
    card = ModelCard(hub.files("my-model")["README.md"].decode())
    assert card.data.pipeline_tag == "image-text-to-text"
    assert card.data.library_name == "transformers"
    assert "qwen2_vl" in card.data.tags
    assert card.data.base_model is None, "a folder of this machine is no name on the hub"
    lines = runs.log(run)
    best = min((line for line in lines if "eval_loss" in line), key=lambda line: line["eval_loss"])
    assert f"| loss | {best['eval_loss']:.4g} |" in card.text
    for words in ("| learning_rate | `0.001` |", "4 steps of training on 31 samples", '("someone/my-model", dtype="auto")',
                  "| `data.json` | ", f"{os.path.getsize(TEST_DATA):,} bytes | evaluation |", "--max_steps 4",
                  "| torch | "):  # fmt: skip
        assert words in card.text, words


def test_a_checkpoint_is_pushed_as_a_model(hub, run):
    """The last one's weights are those of the final model; nothing of the export is left."""
    before = sorted(path.name for path in run.iterdir())
    push(hub, run / "checkpoints" / "step_000004")
    push(hub, run / "checkpoints" / "step_000002")
    (_, newest), (_, last) = hub.repositories[f"{USER}/my-model"]["commits"][:0:-1]
    assert last["model.safetensors"] == (run / "model.safetensors").read_bytes()
    assert newest["model.safetensors"] != last["model.safetensors"]
    assert hub.messages("my-model") == ["Model of my_run, step 4", "Model of my_run, step 2"]
    steps = [json.loads(line)["step"] for line in newest["metrics.jsonl"].splitlines()]
    assert max(steps) == 2, "metrics of later steps are not this model's"
    assert sorted(path.name for path in run.iterdir()) == before


FAULTS = {
    "503 here and there": {
        "POST /api/repos/create": [503, 503],
        "batch": [503],
        "PUT": [503, None, 503],
        "commit": [503],
    },
    "cut connections": {"POST /api/repos/create": ["cut"], "PUT": ["cut", None, "cut"], "preupload": ["cut"]},
    "no answers": {"POST /api/repos/create": [9.0], "tree": [9.0], "PUT": [9.0]},
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "no answers" else ()) for name in FAULTS]
)
def test_faults_are_overcome(name, hub, run):
    hub.faults = {words: deque(faults) for words, faults in FAULTS[name].items()}
    assert "pushed" in push(hub, run, patience=1)
    assert not any(hub.faults.values()), "not every fault was met"
    files = hub.files("my-model")
    for name in UNCHANGED:
        assert files[name] == (run / name).read_bytes(), name
    assert len(hub.messages("my-model")) == 1


def test_files_of_a_model_that_was_there_before_do_not_stay(hub, run):
    old = {"model-00001-of-00002.safetensors": b"1", "model.safetensors.index.json": b"{}", "notes.txt": b"mine"}
    hub.repositories[f"{USER}/my-model"] = {"private": False, "commits": [("", {}), ("old", old)]}
    push(hub, run)
    files = hub.files("my-model")
    assert not {"model-00001-of-00002.safetensors", "model.safetensors.index.json"} & set(files)
    assert files["notes.txt"] == b"mine"


def test_weights_are_sent_from_where_they_lie(hub, run, tmp_path):
    """A copy of a large model would need as much disk again; and nothing that a push writes is left."""
    staged, temporary = tmp_path / "staged", tmp_path / "temporary"
    staged.mkdir()
    temporary.mkdir()
    hub_files.stage(run, run, None, "someone/my-model", staged)
    for name in UNCHANGED:
        assert (staged / name).samefile(run / name), f"{name} was copied"
    push(hub, run, TMPDIR=str(temporary))
    assert hub.files("my-model")["model.safetensors"] == (run / "model.safetensors").read_bytes()
    assert list(temporary.iterdir()) == []


def test_a_push_that_cannot_be_is_one_message(hub, run, tmp_path):
    hub.faults = {"POST /api/repos/create": deque([403] * 9)}
    said = push(hub, run, expect=1)
    assert said.count("\n") == 1
    assert "NOT PUSHED: my_run to my-model (" in said
    assert said.strip().endswith(f"later: python -m util push {run} my-model")
    assert hub.requests.count("POST /api/repos/create") == 1, "asking again does not help"
    assert "no model in it" in push(hub, tmp_path, expect=1)
    (tmp_path / "config.json").write_text("{}")
    assert f"{tmp_path}: there is no training_config.json in it" in push(hub, tmp_path, expect=1)
    hub.close()
    assert "NOT PUSHED" in push(hub, run, expect=1, patience=1)


# ---- from a training ------------------------------------------------------------------------------------------------


def test_a_training_pushes_its_model(hub, tiny_path, tmp_path):
    done = train(hub, tiny_path, tmp_path / "run", "--no-hub_private", "--save_every", "1", "--push_every_save")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().splitlines()[-1].startswith(f"pushed run to {hub.address}/{USER}/my-model")
    assert hub.messages("my-model")[-1] == "Model of run"
    assert hub.files("my-model")["model.safetensors"] == (tmp_path / "run" / "model.safetensors").read_bytes()
    assert not hub.repositories[f"{USER}/my-model"]["private"]
    assert not (tmp_path / "run" / ".pushing").exists()


def test_a_hub_that_is_gone_ends_no_training(hub, tiny_path, tmp_path):
    """It is said before, once, and at the end with the command for later."""
    hub.close()
    done = train(hub, tiny_path, tmp_path / "run", patience=1)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("the hub cannot be asked now") == 1
    assert done.stdout.count("NOT PUSHED") == 1
    last = done.stdout.strip().splitlines()[-1]
    assert last.endswith(f"later: python -m util push {tmp_path / 'run'} my-model")
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_a_hub_that_hangs_ends_no_training(hub, tiny_path, tmp_path):
    hub.faults = {"whoami": deque([60.0]), "POST /api/repos/create": deque([60.0] * 9)}
    done = train(hub, tiny_path, tmp_path / "run", patience=1)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "the hub cannot be asked now (no answer within 0.25 s)" in done.stdout
    assert "NOT PUSHED" in done.stdout.strip().splitlines()[-1]


def test_a_token_that_cannot_push_is_refused_before_training(hub, tiny_path, tmp_path):
    done = train(hub, tiny_path, tmp_path / "run", patience=60, HF_TOKEN="hf_wrong")
    assert done.returncode == 2, done.stderr[-3000:]
    assert "--push_to_hub my-model: the hub rejects the token that is here" in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "role", "said"),
    [
        (
            {"HF_TOKEN": "", "HF_HOME": "/nowhere"},
            "write",
            "refused: --push_to_hub x: there is no token of the hub here",
        ),
        ({}, "read", "refused: --push_to_hub x: the token that is here may only read"),
        ({"HF_HUB_OFFLINE": "1"}, "write", "the hub cannot be asked now"),
        ({}, "write", "nothing to say"),
    ],
)
def test_what_the_hub_says_of_a_token(changes, role, said, hub):
    hub.role = role
    program = """
from util.publish import hub
from util.publish.settings import HubSettings
said = []
try:
    hub.check_token(HubSettings(push_to_hub="x"), said.append)
    print(*said or ["nothing to say"])
except ValueError as error:
    print("refused:", error)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment(hub, 60, **changes), text=True,
                          capture_output=True, timeout=60)  # fmt: skip
    assert said in done.stdout, done.stdout + done.stderr


def test_the_newest_checkpoint_wins(hub, run, tmp_path):
    """While one is being pushed two others come: the older of them is passed over. The end of the training ends it."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    later = copy / "later"
    (copy / "checkpoints").rename(later)
    (copy / "checkpoints").mkdir()

    def appear(number: int) -> None:
        shutil.copytree(later / "step_000002", copy / "checkpoints" / f".{number}")
        (copy / "checkpoints" / f".{number}").rename(copy / "checkpoints" / f"step_{number:06d}")

    def wait_until(condition) -> None:
        deadline = time.time() + 240
        while not condition():
            assert time.time() < deadline, hub.requests
            time.sleep(0.05)

    hub.faults = {"commit": deque([4.0])}
    follower = subprocess.Popen([sys.executable, "-m", "util", "push", str(copy), "my-model", "--follow"], cwd=ROOT,
                                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                env=environment(hub, patience=30))  # fmt: skip
    appear(2)
    wait_until(lambda: any("commit" in request for request in hub.requests))
    appear(3)
    appear(4)
    wait_until(lambda: len(hub.repositories[f"{USER}/my-model"]["commits"]) == 3)
    out, err = follower.communicate(timeout=60)  # closes its standard input
    assert follower.returncode == 0, err
    assert hub.messages("my-model") == ["Model of run, step 2", "Model of run, step 4"]
    assert [line.split()[:2] for line in out.splitlines()] == [["pushed", "step_000002"], ["pushed", "step_000004"]]


# ---- what is published ----------------------------------------------------------------------------------------------


def test_paths_become_names():
    cache = "/home/me/.cache/huggingface/hub/models--Qwen--Qwen2-VL-2B-Instruct/snapshots/0123abc"
    settings = {
        "model": cache, "data": ["/home/me/a.jsonl*2", "../b.json", "folder/c.json"], "launched_by": ["host", 12],
        "output_dir": "/x", "cache_dir": "/y", "resume": "/z", "learning_rate": 1e-5, "other": "/home/me/thing",
        "nested": {"base_model_name_or_path": "Qwen/Qwen2-VL-7B-Instruct", "tilde": "~/thing"}, "schedule": "cosine",
        "template": "{{ x }}\n/home", "division": "1/2", "end": "</s>",
    }  # fmt: skip
    assert hub_files.publishable(settings) == {
        "model": "Qwen/Qwen2-VL-2B-Instruct", "data": ["a.jsonl*2", "b.json", "c.json"], "learning_rate": 1e-5,
        "other": "thing", "nested": {"base_model_name_or_path": "Qwen/Qwen2-VL-7B-Instruct", "tilde": "thing"},
        "schedule": "cosine", "template": "{{ x }}\n/home", "division": "1/2", "end": "</s>",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("rank", "rate", "is_named"), [(0, 1e-5, False), (0, 1e-4, True), (4, 1e-4, False), (4, 1e-5, True)]
)
def test_the_command_of_the_card_trains_with_the_same_learning_rate(rank, rate, is_named):
    """It names the rate wherever finetune.py would take another one by itself."""
    chosen = hub_files.chosen_settings({"learning_rate": rate, "lora_rank": rank})
    assert ("learning_rate" in chosen) == is_named
    words = [text for name, value in chosen.items() for text in (f"--{name}", str(value))]
    assert parse_arguments("", words).learning_rate == rate


def test_the_card_of_an_adapter():
    from huggingface_hub import ModelCard

    settings = {"model": "Qwen/Qwen2-VL-2B-Instruct", "dtype": "bfloat16", "data": [], "freeze": ["vision"]}
    lines = [{"step": 1, "loss": 2.0, "samples": 8}, {"step": 1, "eval_loss": 1.5, "eval_anls": 0.25},
             {"step": 2, "loss": 1.0, "samples": 8}, {"step": 2, "eval_loss": 1.75, "eval_anls": 0.5}]  # fmt: skip
    card = ModelCard(hub_files.model_card(settings, lines, "qwen3_vl", True, "me/adapter"))
    assert card.data.base_model == "Qwen/Qwen2-VL-2B-Instruct"
    assert card.data.library_name == "peft"
    assert card.data.tags == ["qwen3_vl", "lora"]
    for words in ("A LoRA adapter for Qwen/Qwen2-VL-2B-Instruct (not trained: vision), after 2 steps of training on 16",
                  'model = AutoModelForImageTextToText.from_pretrained("Qwen/Qwen2-VL-2B-Instruct", dtype="auto")',
                  'model = PeftModel.from_pretrained(model, "me/adapter")',
                  "|  | step 1 (lowest loss) | step 2 |", "| loss | 1.5 | 1.75 |", "| anls | 0.25 | 0.5 |"):  # fmt: skip
        assert words in card.text, card.text


@pytest.mark.parametrize("name", ["a/b/c", "-a", "a--b", "a..b", "me/", "/x", "a b", "a" * 97, "a."])
def test_names_that_no_repository_can_have(name):
    (problem,) = invalid_hub_settings(HubSettings(push_to_hub=name))
    assert "must be NAME or OWNER/NAME" in problem
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    with pytest.raises(HFValidationError):
        validate_repo_id(name)


@pytest.mark.parametrize("name", ["a", "my-model", "me/My_Model.v2", "1/2"])
def test_names_that_a_repository_can_have(name):
    assert invalid_hub_settings(HubSettings(push_to_hub=name)) == []
