"""Every command, flag and code block of every page: parsed by the program that it names, or run."""

import argparse
import contextlib
import dataclasses
import importlib
import io
import json
import re
import runpy
import sys
from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch

from tests.pages import ROOT, blocks, command_lines, commands, commands_in_prose, pages, prose, read
from tests.test_loss import conversations, packed_gradients, reference, samples  # noqa: F401 (fixtures)
from util import __main__ as entry
from util import loss as loss_module
from util.config import Config, parse_arguments
from util.conversation import control_tokens
from util.data.entries import check_messages
from util.formats import importers
from util.model import build_model

TIMED_LOOPS = ("benchmarks/train_step.py", "benchmarks/peers.py")
TRAINING = (
    "finetune.py",
    "finetune_distributed.py",
    "finetune.sh",
    "finetune_distributed.sh",
    "recipes/chartqa.sh",
    "recipes/agent.sh",
)
# Programs of others, and why they stand in a page. What they are given is not checked, but for flags (below).
FOREIGN = {
    "vllm": "serves the model",
    "sglang": "serves it, too",
    "llama-server": "serves it, too; it comes with llama.cpp",
    "transformers": "the program of that library, which serves, too",
    "curl": "asks such a server",
    "wsl": "installs Linux in Windows",
    "uv": "makes environments and installs into them",
    "conda": "does, too",
    "docker": "builds an image of the Dockerfile, and runs it",
    "srun": "starts a job under Slurm",
    "modelscope": "downloads the model from where it is fast in China",
    "source": "a command of the shell",
    "export": "a command of the shell; its variables are checked",
}
FOREIGN_FLAGS = {
    "vllm": {"--served-model-name", "--max-model-len", "--enable-lora", "--lora-modules", "--max-lora-rank",
             "--mm-processor-kwargs", "--enable-tower-connector-lora", "--enable-auto-tool-choice", "--tool-call-parser",
             "--generation-config", "--help"},
    "sglang": {"--model-path", "--served-model-name", "--enable-lora", "--lora-paths", "--tool-call-parser"},
    "llama-server": {"--mmproj", "--image-min-tokens", "--image-max-tokens"},
    "llama.cpp/convert_hf_to_gguf.py": {"--outfile", "--outtype", "--mmproj"},
    "transformers": {"--port"},
    "wsl": {"--install"},
    "uv": {"--python"},
    "conda": {"--prefix"},
    "docker": {"--rm", "--gpus", "--init", "--ipc", "--build-arg"},
    "srun": {"--nodes", "--ntasks-per-node", "--gpus-per-node"},
    "modelscope": {"--local_dir"},
    "pip": {"--no-build-isolation"},
}  # fmt: skip
# Of other programs than the script they stand before; else the script itself reads a variable.
FOREIGN_VARIABLES = {
    "PIP_INDEX_URL": "pip, which util/setup.sh calls",
    "HF_ENDPOINT": "huggingface_hub",
    "CUDA_VISIBLE_DEVICES": "torch",
    "OMP_NUM_THREADS": "torch",
    "QWEN2_VL_REFERENCE": "benchmarks and tests",
}
FOREIGN_PACKAGES = {"modelscope": "downloads the model from where it is fast in China; nothing here imports it"}
ADDED_FLAGS = {"--z_loss"}  # which docs/adding.md adds, as its example
PYTEST_FLAGS = {"--slow", "--gpu", "--cov", "--durations", "-k", "-x", "-q", "-n", "-m", "-s", "-v"}


class Stopped(BaseException):
    """Raised where a script has read its command line: it is to do nothing more."""

    def __init__(self, parser: argparse.ArgumentParser, unknown: list[str]) -> None:
        super().__init__()
        self.parser, self.unknown = parser, unknown


def read_by_its_parser(parse, words: list[str]) -> str | None:
    """Why a parser refuses words, or None. `--help` is fine."""
    told = io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(told):
        try:
            parse(words)
        except SystemExit as end:
            return None if end.code == 0 else told.getvalue().strip()
    return None


def stop_after_parsing(start: Callable[[], object]) -> Stopped:
    """What the argparse parser of a program makes of its words; the program, begun by `start`, ends there."""
    parse = argparse.ArgumentParser.parse_known_args

    def parse_and_stop(self, args=None, namespace=None):
        _, unknown = parse(self, args, namespace)
        raise Stopped(self, unknown)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", parse_and_stop)
        try:
            start()
        except Stopped as stopped:
            return stopped
    raise AssertionError("no command line was read")


def script_stopped(script: str, words: list[str]) -> Stopped:
    """`stop_after_parsing` of a script of this project."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(ROOT / script), *words])
        patch.setattr(sys, "path", [str(ROOT), *sys.path])
        return stop_after_parsing(lambda: runpy.run_path(str(ROOT / script), run_name="__main__"))


def command_stopped(name: str, words: list[str]) -> Stopped:
    """`stop_after_parsing` of `python -m util NAME`."""
    module = importlib.import_module(entry.COMMANDS[name][0])
    return stop_after_parsing(lambda: module.main(words))


def refusal(stopped: Callable[[], Stopped]) -> str | None:
    """Why a program refuses its words, or None."""
    found: list[Stopped] = []
    problem = read_by_its_parser(lambda _: found.append(stopped()), [])
    if problem or not found:
        return problem
    problems = getattr(found[0].parser, "problems", [])  # a parser that collects them
    return "\n".join([*problems, *(f"unknown: {word}" for word in found[0].unknown)]) or None


# ---- each kind of command -------------------------------------------------------------------------------------------


def check_command(words: list[str]) -> str | None:
    """What is wrong with a command of a page, or None."""
    variables = []
    while words and re.match(r"[A-Z_]+=", words[0]):
        variables.append(words[0].split("=")[0])
        words = words[1:]
    program, arguments = words[0], words[1:]
    if program == "export":
        unknown = [word for word in arguments if word.split("=")[0] not in FOREIGN_VARIABLES]
        return f"nobody is known to read {unknown}" if unknown else None
    if program in FOREIGN:
        return check_commands_within(arguments)
    if program == "pip":
        return check_packages(arguments)
    if program == "python":
        problem = check_python(arguments)
    elif program.startswith("./"):
        problem = check_shell_script(program.removeprefix("./"), arguments)
    else:
        problem = f"{program} is neither of this project nor in FOREIGN"
    return problem or check_variables(variables, program)


def check_python(arguments: list[str]) -> str | None:
    if arguments[:2] == ["-m", "pip"]:
        return check_packages(arguments[2:])
    if arguments[:2] == ["-m", "util"]:
        return check_entry(arguments[2:])
    if arguments[0] == "-m":
        return f"python -m {arguments[1]}: what is typed is python -m util COMMAND"
    script, flags = arguments[0], arguments[1:]
    if script in FOREIGN_FLAGS:  # a script of another project
        unknown = {word for word in flags if word.startswith("--")} - FOREIGN_FLAGS[script]
        return f"nothing is known of {sorted(unknown)} of {script}" if unknown else None
    if not (ROOT / script).is_file():
        return f"there is no {script}"
    if script in TRAINING:
        return read_by_its_parser(lambda words: parse_arguments("", words), flags)
    if script in TIMED_LOOPS:  # what it does not know itself are settings of a training
        stopped: list[Stopped] = []
        problem = read_by_its_parser(lambda words: stopped.append(script_stopped(script, words)), flags)
        return problem or read_by_its_parser(lambda words: parse_arguments("", words), stopped[0].unknown)
    return refusal(lambda: script_stopped(script, flags))


def check_entry(words: list[str]) -> str | None:
    """`python -m util COMMAND ...`; in a sentence it may stand without anything after it."""
    if not words or words == ["--help"]:
        return None
    name, arguments = words[0], words[1:]
    if name == "COMMAND":  # the entry itself is spoken of
        return None
    if name not in entry.COMMANDS:
        return f"python -m util has no command {name}"
    if not arguments:
        return None
    return refusal(lambda: command_stopped(name, arguments))


def check_shell_script(script: str, arguments: list[str]) -> str | None:
    if not (ROOT / script).is_file():
        return f"there is no {script}"
    if script in TRAINING:
        return read_by_its_parser(lambda words: parse_arguments("", words), arguments)
    if script != "run_tests.sh":
        return f"nothing is known of the arguments of {script}"
    unknown = [word for word in arguments if word.startswith("-") and word.split("=")[0] not in PYTEST_FLAGS]
    return f"{script} does not know {unknown}" if unknown else None


def check_packages(words: list[str]) -> str | None:
    """Every package that a page has installed stands in a requirements file, with its reason."""
    required = "".join(path.read_text() for path in ROOT.glob("requirements*.txt"))
    files = {after for before, after in pairwise(words) if before in ("-r", "-c")}
    packages = [word for word in words[1:] if not word.startswith("-") and word not in files]
    unknown = [name for name in packages if name not in FOREIGN_PACKAGES and not is_named(name, required)]
    missing = [file for file in files if not (ROOT / file).exists()]
    return f"no requirements file names {unknown + missing}" if unknown or missing else None


def is_named(package: str, required: str) -> bool:
    """`package` may ask for extras: transformers[serving]."""
    return re.search(rf"\b{re.escape(package.split('[')[0])}\b", required) is not None


def check_variables(variables: list[str], program: str) -> str | None:
    script = program.removeprefix("./")
    source = read(script) if (ROOT / script).is_file() else ""
    unknown = [name for name in variables if name not in FOREIGN_VARIABLES and f"${{{name}" not in source]
    return f"{program} does not read {unknown}" if unknown else None


def check_commands_within(words: list[str]) -> str | None:
    """Of a foreign command: the scripts of this project that its words hold (`srun bash -c '... ./finetune.sh'`)."""
    for word in words:
        found = re.search(r"\./\w+\.sh.*", word, re.DOTALL)
        problem = check_command(command_lines(found[0])[0]) if found else None
        if problem:
            return problem
    return None


@pytest.mark.parametrize("page", pages())
def test_every_command_is_one_that_its_program_takes(page):
    found = commands(read(page)) + commands_in_prose(read(page))
    problems = [f"{' '.join(words)}\n    {problem}" for words in found if (problem := check_command(words))]
    assert not problems, f"{page}:\n" + "\n".join(problems)


def test_every_command_is_in_a_page():
    text = "".join(map(read, pages()))
    missing = [name for name in entry.COMMANDS if f"python -m util {name}" not in text]
    assert not missing, f"no page shows python -m util {missing}"


def test_commands_are_seen_at_all():
    """That the checks above look at something, and tell good from bad."""
    assert len(commands(read("README.md"))) >= 7
    assert len(commands(read("docs/serving.md"))) >= 10
    for wrong in (
        "python finetune.py --learning_rat 1",
        "./finetune.sh --epochs many",
        "python -m util shwo a.json",
        "python -m util show a.json --sampel 3",
        "python -m util check a.json --no_such_flag 3",
        "python -m util check a.json --epochs many",
        "python benchmarks/train_step.py --size tiny --no_such_flag 1",
        "python benchmarks/peers.py --size tiny --loops ours mine",
        "python -m util.show a.json",
        "python test_on_trained_model.py --imag a.jpg",
        "python no_such_script.py",
        "pip install no-such-package",
        "NO_SUCH_VARIABLE=1 ./finetune.sh",
        "srun bash -c './finetune_distributed.sh --no_such_flag 1'",
        "no_such_program",
    ):
        assert check_command(command_lines(wrong)[0]), f"{wrong}: nothing was found wrong with it"


# ---- flags ----------------------------------------------------------------------------------------------------------


def flags_of(parser: argparse.ArgumentParser) -> set[str]:
    return {flag for action in parser._actions for flag in action.option_strings}


@pytest.fixture(scope="module")
def known_flags() -> set[str]:
    """Every flag of every program that a page may speak of."""
    known = {"--help", *PYTEST_FLAGS, *ADDED_FLAGS, *set().union(*FOREIGN_FLAGS.values())}
    for item in dataclasses.fields(Config):
        known |= {f"--{item.name}", f"--no-{item.name}"} if item.type in (bool, "bool") else {f"--{item.name}"}
    for module, _ in entry.COMMANDS.values():
        known |= flags_of(importlib.import_module(module).parser())
    scripts = {words[1] for page in pages() for words in commands(read(page)) + commands_in_prose(read(page))
               if words[0] == "python" and words[1].endswith(".py")}  # fmt: skip
    for script in sorted(scripts - set(TRAINING) - set(FOREIGN_FLAGS)) + ["train_data/make_data.py"]:
        usual = ["--size", "tiny"] if script in TIMED_LOOPS else []
        usual = ["a_run"] if script == "docs/make_pictures.py" else usual
        usual = ["rows.jsonl"] if script == "benchmarks/rows.py" else usual
        if script == "benchmarks/serve_check.py":
            usual = ["--url", "http://localhost:8000", "--model", "a_run", "--served", "a_run"]
        known |= flags_of(script_stopped(script, usual).parser)
    return known


@pytest.mark.parametrize("page", pages())
def test_every_flag_exists(page, known_flags):
    used = set(re.findall(r"(?<![\w-])--[a-z][a-z_-]+", read(page)))
    assert not used - known_flags, f"{page} speaks of flags that no program has"


# ---- code and data --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", pages())
def test_python_blocks_compile_and_json_blocks_are_data_that_training_takes(page, processor):
    for block in blocks(read(page), "python"):
        compile(block, page, "exec")
    forbidden = control_tokens(processor)
    for block in blocks(read(page), "json"):
        data = json.loads(block)
        if isinstance(data, dict):  # an item: in a message of its own, after a picture
            question = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "Where is it?"}]
            answer = {"role": "assistant", "content": [data]}
            data = [{"messages": [{"role": "user", "content": question}, answer]}]
        for sample in data:
            unused: set[str] = set()
            assert check_messages(sample, forbidden, folder=None, unused=unused)
            assert not unused, f"{page}: a sample with keys that say nothing: {unused}"


def blocks_below(heading: str) -> list[str]:
    """The python blocks of docs/adding.md from a heading to the next of any depth."""
    _, _, after = read("docs/adding.md").partition(f"\n{heading}\n")
    assert after, f"docs/adding.md has no heading {heading!r}"
    return blocks(re.split(r"\n##", after)[0], "python")


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_the_loss_that_is_added_works_as_the_page_says(
    z_loss,
    samples,  # noqa: F811
    reference,  # noqa: F811
    tiny_path,
    processor,
    monkeypatch,
):
    """The method and the test of the page, put in their places; the setting is handed over as the page says."""
    _setting, method, test = blocks_below("## A loss")
    place = dict(vars(loss_module))
    exec(method, place)
    monkeypatch.setattr(loss_module.PackedLoss, "token_losses", place["token_losses"])

    def config_with_the_setting(z_loss: float, **settings) -> Config:
        config = Config(**settings)
        config.z_loss = z_loss
        return config

    def build_with_the_setting(config: Config, *arguments):
        model = build_model(config, *arguments)
        model.z_loss = config.z_loss
        return model

    place = {"pytest": pytest, "torch": torch, "CPU": torch.device("cpu"), "packed_gradients": packed_gradients,
             "Config": config_with_the_setting, "build_model": build_with_the_setting}  # fmt: skip
    exec(test, place)
    place["test_z_loss_equals_transformers"](z_loss, samples, tiny_path, processor, reference)


def test_the_format_that_is_added_works_as_the_page_says():
    importer, case = blocks_below("### Another format")
    place = dict(vars(importers))
    exec(importer, place)
    exec(case, place)
    name, written, messages, dropped = place["case"]
    counted: Counter = Counter()
    assert place["DIALOG"] == name
    assert place["from_dialog"](written, counted) == {"messages": messages}
    assert counted == dropped
    assert importers.detect(written) is None, "it is read already: the page needs another example"


def test_files_and_tests_that_a_page_names_are_there():
    """`util/...`, `tests/...` and the like in a sentence are paths; `test_...` are tests."""
    sources = "".join(path.read_text() for path in (ROOT / "tests").glob("*.py"))
    for page in pages():
        text = prose(read(page))
        for path in re.findall(r"`((?:util|tests|docs|benchmarks|recipes|train_data|test_data)/[\w./-]+\.\w+)`", text):
            assert (ROOT / path).exists(), f"{page}: there is no {path}"
        for test in re.findall(r"`(test_[a-z_]+)`", text):
            assert f"def {test}(" in sources, f"{page}: there is no {test}"
