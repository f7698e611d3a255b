"""What the two test scripts share: the command line, answering, and printing answers side by side."""

import argparse
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from util.command_line import UserError
from util.config import Config
from util.results.metrics import (
    LABELS,
    METRICS,
    better_worse_same,
    mean,
    right_of_kind,
    share,
    summarise,
)
from util.results.settings import metrics_problems
from util.results.suited import Choice, choose, label_of
from util.run_folder import BEST, LATEST, ROOT, read_settings

if TYPE_CHECKING:
    from util.vision import Budget

BUDGET_FLAGS = ("min_pixels", "max_pixels", "video_fps", "video_max_frames", "video_max_tokens")


@dataclass
class Settings:
    """The command line of a test script, completed by the settings that a run was trained with."""

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
    metrics: list[str]  # the first one decides whether an answer is right; ["auto"]: those that suit the data
    at_least: float | None
    output_dir: Path
    budget: dict = field(default_factory=dict)


def make_parser(description: str, trained: bool) -> argparse.ArgumentParser:
    """The parser of a test script; `description`: a summary, an empty line, and examples."""
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
    parser.add_argument("--metrics", nargs="+", choices=("auto", *METRICS), metavar="METRIC",
                        help=f"{', '.join(METRICS)}; auto: those that suit the reference answers; default: what the "
                        "run was evaluated by, else auto")  # fmt: skip
    parser.add_argument("--show", type=int, default=30, help="questions printed in full; all are in the .jsonl files")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "test_output", help="where the answers are written")
    for name in BUDGET_FLAGS:
        kind = float if name == "video_fps" else int
        parser.add_argument(f"--{name}", type=kind, help="as in finetune.py; default: what the run was trained with")
    return parser


def parse_arguments(description: str, trained: bool) -> Settings:
    """Read the command line. `trained`: of the script that tests a trained model."""
    parser = make_parser(description, trained)
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
    for problem in metrics_problems("--metrics", settings.metrics):
        parser.error(problem)
    settings.budget = sizes_of_media(trained_with, given)
    return settings


def sizes_of_media(trained_with: dict, given: dict) -> dict:
    """The fields of a vision.Budget: those `given` on the command line, else those that a run was trained with.

    Raises UserError where a value is impossible.
    """
    known = {name: trained_with[name] for name in BUDGET_FLAGS if name in trained_with}
    sizes = {**known, **given}
    Config(**sizes)  # raises
    return sizes


def find_run(run: str | None) -> str:
    """The model to test: that of the run or checkpoint that is given, else that of the newest run."""
    if run is not None:
        run = model_of(run)
        if Path(run).is_dir():
            if not is_finished(Path(run)):
                kept = sorted(Path(run, BEST).glob("step_*"))
                hint = f"; the best so far of this run: {kept[-1]}" if kept else ""
                raise UserError(f"{run}: no model in it; a finished run has config.json or adapter_config.json{hint}")
        else:
            check_hub_name(run)  # now, and not after the untuned model has answered everything
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
    """Whether a run directory holds a model or an adapter; their configs are written last."""
    return (run / "config.json").exists() or (run / "adapter_config.json").exists()


def model_of(path: str) -> str:
    """The folder of a model: the path itself, or that of an export where the path is a checkpoint of a training."""
    if not (Path(path) / "state.json").exists():
        return path
    from util.publish.export import exported

    return exported(path)


def run_before(settings: Settings) -> list:
    """The untuned model's answers, from before.jsonl where that was made from the same model, data and settings."""
    return answers_of(settings, settings.base, "before", reuse=True)


def run_after(settings: Settings) -> list:
    """The trained model's answers."""
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
    from util.model import choose_device, choose_dtype, find_model, load_processor, model_type_of
    from util.results import answer_files, evaluate
    from util.vision import Budget

    device = choose_device(settings.device)
    path = find_model(model, device)
    budget = Budget(**settings.budget, model_type=model_type_of(path))
    precision = str(choose_dtype(settings.dtype, device))
    processor = load_processor(path)
    questions = evaluate.questions_of(load_examples(settings.data, processor))
    made_from = answer_files.fingerprint(path, settings.data, budget, settings.max_new_tokens)
    made_from["dtype"] = precision
    file = settings.output_dir / f"{name}.jsonl"
    if reuse and (known := answer_files.read_answers(file, made_from)):
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
    answer_files.write_answers(file, made_from, answers)
    return answers


def answer_one(settings: Settings, model: str | None) -> None:
    """Print the answer to one question about the images and videos of the command line, and its boxes in pixels."""
    from util.conversation import control_tokens
    from util.data.entries import check_messages
    from util.data.lines import DataError
    from util.model import choose_device, find_model, load_processor, model_type_of
    from util.results.evaluate import ask
    from util.vision import Budget

    path = find_model(model, choose_device(settings.device))
    answerer = load_answerer(settings, path, load_processor(path))
    items = [{"type": "image", "image": image} for image in settings.image]
    items += [{"type": "video", "video": video} for video in settings.video]
    items.append({"type": "text", "text": settings.question})
    # The check asks for an answer, too; "?" stands in its place and is not shown to the model.
    asked = [{"role": "user", "content": items}, {"role": "assistant", "content": "?"}]
    try:
        messages = check_messages({"messages": asked}, control_tokens(answerer.processor), Path.cwd())[:1]
    except DataError as error:
        raise UserError(f"the question{error}") from None
    budget = Budget(**settings.budget, model_type=model_type_of(path))
    answer = ask(answerer, messages, budget, settings.max_new_tokens).strip()
    print(answer)
    images = [item for item in messages[0]["content"] if item["type"] == "image"]
    show_boxes(answer, images, budget, settings.output_dir)


def show_boxes(answer: str, images: list[dict], budget: "Budget", folder: Path) -> None:
    """Print the boxes of an answer, if it has any, in pixels of the image asked about, and draw them into `folder`.

    `budget`: with which the model was asked, since some count boxes in pixels of the image as it is resized.
    """
    from PIL import Image

    from util import vision
    from util.data import boxes, fetch

    if not images or not boxes.boxes_in(answer):
        return
    if len(images) > 1:
        print("\nboxes: the answer does not say in which image they lie; in pixels of each:")
    for number, item in enumerate(images):
        (local,) = fetch.localise([item], fetch.FetchSettings())
        pixels = vision.to_tensor(vision.open_image(local["image"]), local["image"])
        image = Image.fromarray(pixels.permute(1, 2, 0).numpy())  # as the model saw it
        found = boxes.from_text(answer, vision.box_scale(item, *image.size, budget))
        file = folder / (f"boxes_{number}.png" if len(images) > 1 else "boxes.png")
        folder.mkdir(parents=True, exist_ok=True)
        boxes.draw_boxes(image, found).save(file)
        name = fetch.printable(item["image"])
        print(f"\nboxes in pixels of {name} ({image.width} x {image.height}), drawn in {file}:")
        for label, corners in found:
            in_words = "  ".join(f"{value:7.1f}" for value in corners)
            print(f"  {in_words}  {label or '(no label)'}")


def chosen_metrics(settings: Settings, answers: list) -> Choice:
    """The metrics of the command line, or where it says "auto" those that suit the references of these answers."""
    return choose(settings.metrics, [(answer.kind, answer.reference) for answer in answers])


def print_answers(columns: dict[str, list], choice: Choice, show: int) -> None:
    """Question, reference and the answers of each column, up to `show` questions; then the scores."""
    rows = list(zip(*columns.values(), strict=True))
    for row in rows[:show]:
        asked = row[0]
        media = ", ".join(str(item[item["type"]]) for item in asked.media)
        if media:
            media = f"  [{media}]"
        print(f"{asked.where}{media}\n   question    {asked.question!r}\n  reference    {asked.reference!r}")
        for name, answer in zip(columns, row, strict=True):
            print(f"{name:>11}  {mark(answer.score(choice.metrics[0]))} {answer.answer!r}")
        print()
    if len(rows) > show:
        print(f"... and {len(rows) - show} more (--show {len(rows)} prints them)\n")
    print_scores(columns, choice)


def mark(score: float | None) -> str:
    """A sign for right or wrong, the score of an answer that is partly right, "-" for none."""
    return {None: "-", 0.0: "✗", 1.0: "✓"}.get(score) or f"{score:.2f}"


def print_before_and_after(before: list, after: list, choice: Choice, show: int) -> None:
    """Print both answers to each question, the scores, and what changed."""
    print_answers({"before": before, "after": after}, choice, show)
    better, worse, same = better_worse_same(before, after, choice.metrics[0])
    print(f"\n{better} answers became better, {worse} became worse, {same} stayed as they were")


def write_report(settings: Settings) -> None:
    """report.html, from the two files of answers."""
    files = [settings.output_dir / f"{name}.jsonl" for name in ("before", "after")]
    run = settings.run if read_settings(settings.run) else None  # a model that was not trained here has no loss curve
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


def print_scores(columns: dict[str, list], choice: Choice) -> None:
    """A table: scores by column, and one metric by kind of question where the data names kinds; then which suit."""
    summaries = [summarise(answers, choice.metrics) for answers in columns.values()]
    print_row("", columns)
    for metric in choice.metrics:
        print_row(LABELS[metric], [share(summary[metric]) for summary in summaries])
    print_row("loss", [f"{summary['loss']:.3f}" for summary in summaries])
    for kind, metric in choice.of_kind.items():
        cells = []
        for answers in columns.values():
            cells.append(right_of_kind([answer.score(metric) for answer in answers if answer.kind == kind]))
        print_row(label_of(kind, choice), cells)
    print_row("questions", [str(summary["questions"]) for summary in summaries])
    if choice.reason:
        print(f"\n{choice.reason}")


def print_row(label: str, cells: Iterable[str]) -> None:
    print(f"{label:>24}" + "".join(f"{cell:>12}" for cell in cells))
