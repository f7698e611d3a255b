"""What the two test scripts share: settings, answering, printing before and after side by side."""

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path

from util.command_line import UserError
from util.config import Config
from util.results.metrics import LABELS, METRICS, better_worse_same, mean, right_of_kind, share
from util.run_folder import LATEST, ROOT, read_settings

BUDGET_FLAGS = ("min_pixels", "max_pixels", "video_fps", "video_max_frames", "video_max_tokens")


@dataclass
class Settings:
    """The command line of a test script, and what a run directory says about how it was trained."""

    base: str | None  # the untuned model; None: the default of finetune.py
    run: str | None
    data: list[str]
    image: list[str]
    video: list[str]
    question: str | None
    device: str
    dtype: str
    batch_size: int
    max_tokens: int
    max_new_tokens: int
    show: int
    metrics: list[str]  # the first one is the headline
    at_least: float | None
    output_dir: Path
    budget: dict = field(default_factory=dict)


def parse_arguments(description: str, trained: bool) -> Settings:
    summary, _, examples = description.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    if trained:
        parser.add_argument(
            "run", nargs="?", help="run directory, one of its checkpoints, or hub name; default: the newest run"
        )
        parser.add_argument("--at_least", type=float, help="exit 1 where the first of --metrics is below this share")
    parser.add_argument("--model", dest="base", help="the untuned model; default: the one the run started from")
    parser.add_argument("--data", nargs="+", default=[str(ROOT / "test_data" / "data.json")], help="test data")
    parser.add_argument("--image", nargs="+", default=[], help="image(s) for one question of your own")
    parser.add_argument("--video", nargs="+", default=[], help="video(s) for one question of your own")
    parser.add_argument("--question", help="one question of your own")
    parser.add_argument("--device", default="auto", help="cuda, cuda:1, cpu; default: the GPU where there is one")
    parser.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float32"), help="precision")
    parser.add_argument("--batch_size", type=int, default=32, help="questions answered at a time")
    parser.add_argument("--max_tokens", type=int, help="tokens of the questions answered at a time (memory only; none "
                        "is cut); default: what the run was trained with")  # fmt: skip
    parser.add_argument("--max_new_tokens", type=int, default=256, help="longest answer")
    parser.add_argument("--metrics", nargs="+", choices=tuple(METRICS), metavar="METRIC",
                        help=f"{', '.join(METRICS)}; default: what the run was evaluated by")  # fmt: skip
    parser.add_argument("--show", type=int, default=30, help="questions printed in full; all are in the .jsonl files")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "test_output", help="where the answers are written")
    for name in BUDGET_FLAGS:
        kind = float if name == "video_fps" else int
        parser.add_argument(f"--{name}", type=kind, help="as in finetune.py; default: what the run was trained with")
    values = vars(parser.parse_args())
    given = {name: value for name in BUDGET_FLAGS if (value := values.pop(name)) is not None}
    if (values["image"] or values["video"]) and not values["question"]:
        parser.error("--image and --video go with --question")
    counts = {name: values[name] for name in ("batch_size", "max_tokens", "max_new_tokens") if values[name] is not None}
    if min(counts.values()) < 1:
        parser.error(f"{' '.join(f'--{name} {count}' for name, count in counts.items())}: must be at least 1")
    settings = Settings(**{"run": None, "at_least": None, **values})
    if trained:
        settings.run = find_run(settings.run)
    else:
        settings.base = settings.base and model_of(settings.base)
    trained_with = read_settings(settings.run)
    settings.base = settings.base or trained_with.get("model")
    settings.max_tokens = settings.max_tokens or trained_with.get("max_tokens") or Config().max_tokens
    settings.metrics = settings.metrics or trained_with.get("eval_metrics") or Config().eval_metrics
    known = {name: trained_with[name] for name in BUDGET_FLAGS if name in trained_with}
    settings.budget = {**known, **given}
    Config(**settings.budget)  # names what cannot be
    return settings


def find_run(run: str | None) -> str:
    """The model to test: of the run or checkpoint that is given, else of the newest run."""
    if run is not None:
        run = model_of(run)
        if Path(run).is_dir():
            if not is_finished(Path(run)):
                raise UserError(f"{run}: no model in it; a finished run has config.json or adapter_config.json")
        else:
            check_hub_name(run)  # before the untuned model has answered everything
        return run
    if not is_finished(LATEST):
        raise UserError("no finished run in train_output/; train one with ./finetune.sh, or name a run directory")
    return str(LATEST.resolve())


def check_hub_name(run: str) -> None:
    """Raise UserError where a name is neither a folder here nor a model of the hub."""
    from util.adapters.lora import base_of
    from util.model import load_config

    try:
        load_config(base_of(run))
    except UserError as error:
        raise UserError(str(error).removeprefix("--model ")) from None


def is_finished(run: Path) -> bool:
    """Does a run directory hold a model, or an adapter? Their configs are written last."""
    return (run / "config.json").exists() or (run / "adapter_config.json").exists()


def model_of(path: str) -> str:
    """Where the model of a path is: what is a checkpoint in training is exported."""
    if not (Path(path) / "state.json").exists():
        return path
    from util.publish.export import exported

    return exported(path)


def run_before(settings: Settings) -> list:
    """The untuned model's answers: read from before.jsonl where it was made from the same, else made."""
    return answers_of(settings, settings.base, "before", reuse=True)


def run_after(settings: Settings) -> list:
    return answers_of(settings, settings.run, "after", reuse=False)


def load_answerer(settings: Settings, path: str, processor):
    """The model of `path`, ready to answer."""
    from util.adapters.lora import base_of
    from util.model import choose_device, choose_dtype, load_config
    from util.results.evaluate import Answerer

    load_config(base_of(path))
    device = choose_device(settings.device)
    return Answerer.load(path, processor, device, choose_dtype(settings.dtype, device))


def answers_of(settings: Settings, model: str | None, name: str, reuse: bool) -> list:
    """Answer all test questions with a model, and write `test_output/NAME.jsonl`."""
    from util.dataset import load_examples
    from util.model import choose_device, choose_dtype, find_model, load_processor
    from util.results import evaluate
    from util.vision import Budget

    device = choose_device(settings.device)
    path = find_model(model, device)
    budget = Budget(**settings.budget)
    precision = str(choose_dtype(settings.dtype, device))
    processor = load_processor(path)
    questions = evaluate.questions_of(load_examples(settings.data, processor))
    made_from = {**evaluate.fingerprint(path, settings.data, budget, settings.max_new_tokens), "dtype": precision}
    file = settings.output_dir / f"{name}.jsonl"
    if reuse and (known := evaluate.read_answers(file, made_from)):
        print(f"{name}: {len(known)} answers of {path}, from {file}")
        return known
    answerer = load_answerer(settings, path, processor)
    answers = evaluate.answer_all(
        answerer,
        evaluate.QuestionSamples(questions, processor, budget),
        settings.batch_size,
        settings.max_new_tokens,
        f"{name}: {Path(path).name}",
        max_tokens=settings.max_tokens,
    )
    evaluate.write_answers(file, made_from, answers)
    return answers


def answer_one(settings: Settings, model: str | None) -> None:
    """Print the answer to one question about the images and videos of the command line, and its boxes in pixels."""
    from util.conversation import control_tokens
    from util.data.entries import check_messages
    from util.data.lines import DataError
    from util.model import choose_device, find_model, load_processor
    from util.results.evaluate import ask
    from util.vision import Budget

    path = find_model(model, choose_device(settings.device))
    answerer = load_answerer(settings, path, load_processor(path))
    media = [("image", path) for path in settings.image] + [("video", path) for path in settings.video]
    items = [{"type": kind, kind: path} for kind, path in media] + [{"type": "text", "text": settings.question}]
    asked = [
        {"role": "user", "content": items},
        {"role": "assistant", "content": "?"},
    ]  # a stand-in: only the question is asked
    try:
        messages = check_messages({"messages": asked}, control_tokens(answerer.processor), Path.cwd())[:1]
    except DataError as error:
        raise UserError(f"the question{error}") from None
    answer = ask(answerer, messages, Budget(**settings.budget), settings.max_new_tokens).strip()
    print(answer)
    show_boxes(answer, [item for item in messages[0]["content"] if item["type"] == "image"], settings.output_dir)


def show_boxes(answer: str, images: list[dict], folder: Path) -> None:
    """Print the boxes of an answer, if it has any, in pixels of the image asked about, and draw them into `folder`."""
    from util import vision
    from util.data import boxes, fetch

    if not images or not boxes.from_text(answer, 1, 1):
        return
    if len(images) > 1:
        print("\nboxes: the answer does not say in which image they lie; in pixels of each:")
    for number, item in enumerate(images):
        (local,) = fetch.localise([item], fetch.FetchSettings())
        image = vision.open_image(local["image"])
        found = boxes.from_text(answer, *image.size)
        file = folder / (f"boxes_{number}.png" if len(images) > 1 else "boxes.png")
        folder.mkdir(parents=True, exist_ok=True)
        boxes.draw_boxes(image, found).save(file)
        name = fetch.printable(item["image"])
        print(f"\nboxes in pixels of {name} ({image.width} x {image.height}), drawn in {file}:")
        for label, corners in found:
            print(f"  {'  '.join(f'{value:7.1f}' for value in corners)}  {label or '(no label)'}")


def print_answers(columns: dict[str, list], metrics: list[str], show: int) -> None:
    """Question, reference and the answers of each column, up to `show` questions; then the scores."""
    rows = list(zip(*columns.values(), strict=True))
    for row in rows[:show]:
        asked = row[0]
        media = f"  [{', '.join(str(item[item['type']]) for item in asked.media)}]" if asked.media else ""
        print(f"{asked.where}{media}\n   question    {asked.question!r}\n  reference    {asked.reference!r}")
        for name, answer in zip(columns, row, strict=True):
            print(f"{name:>11}  {mark(answer.score(metrics[0]))} {answer.answer!r}")
        print()
    if len(rows) > show:
        print(f"... and {len(rows) - show} more (--show {len(rows)} prints them)\n")
    print_scores(columns, metrics)


def mark(score: float | None) -> str:
    """Right, wrong, or how right."""
    return {None: "-", 0.0: "✗", 1.0: "✓"}.get(score) or f"{score:.2f}"


def compare(before: list, after: list, metrics: list[str], show: int) -> None:
    """Print both answers to each question, the scores, and what changed."""
    print_answers({"before": before, "after": after}, metrics, show)
    better, worse, same = better_worse_same(before, after, metrics[0])
    print(f"\n{better} answers became better, {worse} became worse, {same} stayed as they were")


def write_report(settings: Settings) -> None:
    """report.html, from the two files of answers."""
    files = [settings.output_dir / f"{name}.jsonl" for name in ("before", "after")]
    run = settings.run if read_settings(settings.run) else None  # of another's model there is no loss curve
    from util.results.report import report  # it imports torch; --help need not

    report(files, settings.output_dir / "report.html", settings.metrics, run)


def require(after: list, metric: str, at_least: float | None) -> None:
    """Exit 1 where the mean of a metric is below `at_least`."""
    score = mean([answer.score(metric) for answer in after]) or 0.0
    if at_least is not None:
        verdict = "reached" if score >= at_least else "MISSED"
        print(f"{LABELS[metric]} {score:.1%}, asked for at least {at_least:.1%}: {verdict}")
        if score < at_least:
            sys.exit(1)


def print_scores(columns: dict[str, list], metrics: list[str]) -> None:
    """A table: scores by column, and the first metric by kind of sample where the data names kinds."""
    from util.results.evaluate import summarise

    rows = {name: summarise(answers, metrics) for name, answers in columns.items()}
    kinds = sorted({a.kind for a in next(iter(columns.values())) if a.kind})
    print(f"{'':>24}" + "".join(f"{name:>12}" for name in columns))
    for metric in metrics:
        print(f"{LABELS[metric]:>24}" + "".join(f"{share(row[metric]):>12}" for row in rows.values()))
    print(f"{'loss':>24}" + "".join(f"{row['loss']:>12.3f}" for row in rows.values()))
    for kind in kinds if len(kinds) > 1 else []:
        cells = [
            right_of_kind([a.score(metrics[0]) for a in answers if a.kind == kind]) for answers in columns.values()
        ]
        print(f"{kind:>24}" + "".join(f"{cell:>12}" for cell in cells))
    print(f"{'questions':>24}" + "".join(f"{row['questions']:>12}" for row in rows.values()))
