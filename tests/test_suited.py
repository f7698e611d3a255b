"""Which metrics are chosen for reference answers, and what is said of those that do not suit."""

import json
import re
import sys
from pathlib import Path

import pytest

from tests import runs, warm
from util.command_line import UserError
from util.config import Config
from util.results import suited
from util.results.metrics import METRICS
from util.results.settings import Metric
from util.results.suited import choose, kind_of_answer, label_of

ROOT = Path(__file__).resolve().parent.parent
BOX = "<|object_ref_start|>the cross<|object_ref_end|><|box_start|>(389,362),(610,656)<|box_end|>"
CALL = '<tool_call>\n{"name": "click", "arguments": {"x": 3}}\n</tool_call>'
STORY = "The red circle is to the left of a blue square, and below both there is a line."


@pytest.mark.parametrize(
    ("reference", "kind"),
    [
        ("12", "single numbers"), (" 0.5%\n", "single numbers"), ("-3.2e4", "single numbers"),
        ("1,234", "short answers"), ("12 cats", "short answers"), ("", "short answers"),
        ("University of California, San Diego", "short answers"), ("One two three four five six", "long answers"),
        ("红色的圆在蓝色方块左边", "short answers"), ("红色的圆在蓝色方块左边，下面有一条线", "long answers"),
        (STORY, "long answers"), (BOX, "boxes"), (f"Here: {BOX}", "boxes"), ("(389,362),(610,656)", "boxes"),
        (CALL, "calls of tools"), (f"I click it.\n{CALL}", "calls of tools"),
    ],
)  # fmt: skip
def test_kinds_of_answers(reference, kind):
    assert kind_of_answer(reference) == kind


def of(*references: str, kind: str | None = None) -> list[tuple]:
    return [(kind, reference) for reference in references]


@pytest.mark.parametrize(
    ("questions", "metrics", "reason"),
    [
        (of("red", "blue"), ["exact_match", "token_f1"], "100% of the reference answers are short answers"),
        (of("1", "2"), ["relaxed_accuracy", "exact_match"], "100% of the reference answers are single numbers"),
        (of(BOX), ["box_iou"], "100% of the reference answers are boxes"),
        (of(STORY, STORY), ["token_f1", "chrf"], "Scored by token F1 and chrF: 100% of the reference answers are long answers."),
        (of("1", "2", "3", "red"), ["relaxed_accuracy", "exact_match", "token_f1"],
         "75% of the reference answers are single numbers, 25% short answers"),
        (of(*["red"] * 19, BOX), ["exact_match", "token_f1"], "95% of the reference answers are short answers, 5% boxes"),
        (of("red", "red", BOX), ["exact_match", "token_f1", "box_iou"],
         "Scored by exact match, token F1 and box IoU: 67% of"),
        ([], ["exact_match", "token_f1"], "there are no reference answers"),
    ],
)  # fmt: skip
def test_what_auto_chooses(questions, metrics, reason):
    choice = choose(["auto"], questions)
    assert choice.metrics == metrics
    assert reason in choice.reason


def test_calls_of_tools_have_the_metric_of_that_name_where_there_is_one(monkeypatch):
    monkeypatch.setitem(METRICS, "tool_call", lambda answer, reference: 1.0)
    monkeypatch.setitem(suited.LABELS, "tool_call", "tool call")
    assert choose(["auto"], of(CALL)).metrics == ["tool_call", "exact_match"]


def test_each_kind_of_question_is_shown_by_what_suits_it():
    questions = [*of("red", "blue", "green", kind="colour"), *of(BOX, kind="box"), *of(STORY, kind="story")]
    choice = choose(["auto"], questions)
    assert choice.metrics[0] == "exact_match"
    assert choice.of_kind == {"box": "box_iou", "colour": "exact_match", "story": "token_f1"}
    shown = [label_of(kind, choice) for kind in choice.of_kind]
    assert shown == ["box (box IoU)", "colour", "story (token F1)"]
    named = choose(["anls"], questions)
    assert named.of_kind == dict.fromkeys(("box", "colour", "story"), "anls"), "what is named is not changed"


@pytest.mark.parametrize(
    ("asked", "references", "said"),
    [
        (["exact_match"], [STORY], "exact match does not suit most of these answers (100% of the reference answers are "
         "long answers); what suits: token F1 and chrF (--metrics auto)."),
        (["box_iou", "anls"], ["red"], "box IoU does not suit most"),
        (["box_iou", "exact_match"], [STORY], "box IoU and exact match do not suit most"),
        (["relaxed_accuracy"], ["1", "red", "3"], ""),
        (["exact_match", "token_f1"], ["red"], ""),
        (["exact_match"], ["1"], ""),
        (["token_f1"], [STORY, BOX], ""),
    ],
)  # fmt: skip
def test_a_named_metric_that_does_not_suit_is_said(asked, references, said):
    choice = choose(asked, of(*references))
    assert choice.metrics == asked
    assert choice.reason.startswith(said) if said else not choice.reason


def test_every_metric_can_be_named_and_auto_stands_alone():
    for metric in Metric.__args__:
        Config(eval_metrics=[metric])
    assert set(Metric.__args__) == set(METRICS)
    assert Config().eval_metrics == ["auto"]
    with pytest.raises(UserError, match="--eval_metrics auto anls: auto chooses all of them"):
        Config(eval_metrics=["auto", "anls"])


def test_the_plan_the_evaluation_the_test_and_the_report_go_by_it(tiny_path, tmp_path):
    """Through the command line, on long answers: exact match is no headline anywhere, and the reason is told."""
    data = tmp_path / "data.jsonl"
    lines = [[{"role": "user", "content": f"Tell {n}"}, {"role": "assistant", "content": STORY}] for n in range(4)]
    data.write_text("\n".join(json.dumps({"messages": line}) for line in lines))
    config = runs.settings(tiny_path, tmp_path / "run", data=data, eval_data=data, eval_samples=3, max_steps=1)
    done = warm.run([sys.executable, "finetune.py", *runs.flags(config)])
    assert done.returncode == 0, done.stderr
    reason = "Scored by token F1 and chrF: 100% of the reference answers are long answers."
    assert f"answers  3 held-out questions. {reason}" in done.stdout
    evaluated = re.search(r"3 answers: (.*)", done.stdout)[1]
    assert evaluated.startswith("token F1 "), evaluated
    assert "exact match" not in evaluated
    words = [sys.executable, "test_on_trained_model.py", str(tmp_path / "run"), "--data", str(data), "--max_new_tokens",
             "4", "--output_dir", str(tmp_path / "out")]  # fmt: skip
    done = warm.run(words)
    assert done.returncode == 0, done.stderr
    assert reason in done.stdout
    assert "exact match" not in done.stdout
    page = (tmp_path / "out" / "report.html").read_text()
    assert f'"suits":"{reason}"' in page
    assert '"metrics":[{"name":"token_f1"' in page
    assert '"final_model":"step 1 of 1, evaluation loss ' in page, "the report says which model the run left"
