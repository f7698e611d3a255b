"""Scores against tables made by hand from the definitions."""

import random
from difflib import SequenceMatcher

import pytest

from util.results.metrics import (
    METRICS,
    anls,
    box_iou,
    boxes_of,
    chrf,
    edit_distance,
    exact_match,
    iou,
    mean,
    relaxed_accuracy,
    token_f1,
)


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("red", "red", 1),
        ("\nred ", "red", 1),
        ("Red", "red", 0),
        ("red.", "red", 0),
        ("", "", 1),
        ("", "red", 0),
        ("红色", "红色", 1),
    ],
)
def test_exact_match(answer, reference, score):
    assert exact_match(answer, reference) == score


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("the red circle", "red circle", 0.8),  # 2 of 3 words, 2 of 2
        ("红色", "红", 2 / 3),
        ("", "", 1.0),
        ("", "red", 0.0),
        ("blue", "red", 0.0),
        ("Red, red!", "red", 2 / 3),  # one of them is too many
    ],
)
def test_token_f1(answer, reference, score):
    assert token_f1(answer, reference) == pytest.approx(score)


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("a b", "ab", 1.0),  # white space does not count
        ("", "", 1.0),
        ("", "red", 0.0),
        ("xyz", "red", 0.0),
        ("红", "红色", 5 * 1 * 0.5 / (4 * 1 + 0.5)),  # single characters alone: precision 1, recall a half
        # singles 2 of 3, pairs 1 of 2, triples 0 of 1, of both: a mean of 7/18
        ("abd", "abc", 7 / 18),
    ],
)
def test_chrf(answer, reference, score):
    assert chrf(answer, reference) == pytest.approx(score)


def test_chrf_is_that_of_sacrebleu():
    theirs = pytest.importorskip("sacrebleu.metrics", reason="sacrebleu is not installed").CHRF()
    dice = random.Random(0)
    words = ["red", "circle", "the", "left", "of", "红色", "的", "Straße", "a", "1,234", "—"]
    for _ in range(300):
        reference = " ".join(dice.choices(words, k=dice.randrange(1, 30)))
        answer = " ".join(dice.choices([*words, *reference.split()], k=dice.randrange(0, 30)))
        expected = theirs.sentence_score(answer, [reference]).score / 100
        assert chrf(answer, reference) == pytest.approx(expected, abs=1e-9), (answer, reference)


RELAXED = [
    ("10", "10", 1),
    ("10.5", "10", 1),  # just 5 %
    ("10.51", "10", 0),
    ("9.5", "10", 1),
    ("9.49", "10", 0),
    ("-10.4", "-10", 1),
    ("10", "-10", 0),
    ("-9.6", "-10", 1),
    ("+10", "10", 1),
    ("1e3", "1000", 1),
    (".5", "0.5", 1),
    ("5.", "5", 1),
    ("0.52", "0.5", 1),
    ("0.53", "0.5", 0),
    ("12%", "12%", 1),
    ("12.5%", "12%", 1),
    ("13%", "12%", 0),
    ("12", "12%", 0),  # 12 against 0.12
    ("0.12", "12%", 1),
    ("12 %", "12%", 0),  # with a space it is no number
    ("12 %", "12 %", 1),  # but text
    ("1,234", "1,234", 1),  # text, too
    ("1,234", "1234", 0),
    ("1234", "1,234", 0),
    ("1,230", "1,234", 0),
    ("$12", "12", 0),
    ("2015", "2015", 1),
    ("2014", "2015", 1),  # a year is a number like any other
    ("1900", "2015", 0),
    ("0", "0", 1),
    ("0.0", "0", 0),  # a reference of zero is compared as text
    ("0.01", "0", 0),
    ("0", "0.5", 0),
    ("-", "-", 1),
    ("-", "5", 0),
    ("", "", 1),
    ("", "5", 0),
    ("Yes", "yes", 1),
    ("yes.", "yes", 0),
    (" Germany\n", "germany", 1),
    ("Germany", "France", 0),
    ("[1, 2]", "[1, 2]", 1),
    ("[1, 2]", "[2, 1]", 0),
    ("1, 2", "1, 2", 1),
    ("nan", "nan", 1),  # words, whatever a computer makes of them
    ("inf", "1e9", 0),
    ("1_000", "1000", 0),
    ("٣", "3", 0),
    ("3 million", "3", 0),
]


@pytest.mark.parametrize(("answer", "reference", "score"), RELAXED)
def test_relaxed_accuracy(answer, reference, score):
    assert relaxed_accuracy(answer, reference) == score


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("invoice", "invoice", 1),
        ("Invoice", "invoice ", 1),
        ("in  voice", "in voice", 1),
        ("invoce", "invoice", 1 - 1 / 7),
        ("invoices", "invoice", 1 - 1 / 8),
        ("abcd", "abxy", 0),  # half of it: not below the threshold
        ("abcde", "abcxy", 0.6),
        ("abc", "xyz", 0),
        ("", "", 1),
        ("", "abc", 0),
        ("abc", "", 0),
        ("1,234", "1234", 0.8),
        ("12 %", "12%", 0.75),
        ("红色", "红的", 0),
        ("红色的圆", "红色的方", 0.75),
        ("kitten", "sitting", 1 - 3 / 7),
    ],
)
def test_anls(answer, reference, score):
    assert anls(answer, reference) == pytest.approx(score)


def test_edit_distance_of_random_texts():
    """Not above any way of editing, and the bounds and symmetries every distance has."""
    generator = random.Random(0)
    texts = ["".join(generator.choices("abc", k=generator.randrange(12))) for _ in range(60)]
    for one, other, third in zip(texts, texts[1:], texts[2:], strict=False):
        distance = edit_distance(one, other)
        assert distance == edit_distance(other, one)
        assert abs(len(one) - len(other)) <= distance <= max(len(one), len(other))
        assert edit_distance(one, third) <= distance + edit_distance(other, third)
        script = SequenceMatcher(None, one, other, autojunk=False).get_opcodes()
        assert distance <= sum(max(b - a, d - c) for kind, a, b, c, d in script if kind != "equal")


@pytest.mark.parametrize(
    ("one", "other", "score"),
    [
        ((0, 0, 10, 10), (0, 0, 10, 10), 1),
        ((0, 0, 10, 10), (5, 0, 15, 10), 1 / 3),
        ((0, 0, 10, 10), (5, 5, 15, 15), 25 / 175),
        ((0, 0, 10, 10), (10, 0, 20, 10), 0),  # they touch
        ((0, 0, 10, 10), (20, 20, 30, 30), 0),
        ((0, 0, 10, 10), (2, 2, 4, 4), 0.04),
        ((5, 5, 5, 9), (0, 0, 10, 10), 0),  # no area
        ((9, 9, 1, 1), (0, 0, 10, 10), 0),  # the wrong way round
        ((-5, 0, 5, 10), (0, 0, 10, 10), 1 / 3),
    ],
)
def test_iou(one, other, score):
    assert iou(one, other) == iou(other, one) == pytest.approx(score)


def box(*corners: int) -> str:
    return "<|object_ref_start|>a dog<|object_ref_end|><|box_start|>({},{}),({},{})<|box_end|>".format(*corners)


ONE, NEXT, FAR = (0, 0, 10, 10), (5, 0, 15, 10), (500, 500, 600, 600)


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        (box(*ONE), box(*ONE), 1),
        ("(0,0),(10,10)", box(*ONE), 1),  # as it reads without special tokens
        ("( 0 , 0 ) , ( 10 , 10 )", box(*ONE), 1),
        (box(*NEXT), box(*ONE), 1 / 3),
        ("no idea", box(*ONE), 0),
        (box(*ONE), "no box", None),
        ("", "", None),
        (box(*FAR) + box(*ONE), box(*ONE) + box(*FAR), 1),  # in any order
        (box(*ONE), box(*ONE) + box(*FAR), 0.5),  # one is missing
        (box(*ONE) + box(*FAR), box(*ONE), 0.5),  # one is too many
        (box(*ONE) + box(*NEXT), box(*ONE), 0.5),  # a box has one partner
        ("(0,0),(10", box(*ONE), 0),
        ("(0.5,0),(10,10)", box(*ONE), 0),  # whole numbers only
    ],
)
def test_box_iou(answer, reference, score):
    assert box_iou(answer, reference) == pytest.approx(score)


def test_boxes_are_read_in_order():
    assert boxes_of(box(*FAR) + " and " + box(-1, 2, 3, 999)) == [FAR, (-1, 2, 3, 999)]


def test_means_leave_out_what_is_not_measured():
    assert mean([1.0, None, 0.0]) == 0.5
    assert mean([None]) is None
    assert mean([]) is None


@pytest.mark.parametrize("name", METRICS)
def test_scores_stay_between_0_and_1(name):
    generator = random.Random(name)
    pieces = ["red", "12", "%", ",", " ", "-", ".", box(*ONE), box(*FAR), "红", "\n", "1e400", "(", "inf"]
    for _ in range(500):
        answer, reference = ("".join(generator.choices(pieces, k=generator.randrange(6))) for _ in range(2))
        score = METRICS[name](answer, reference)
        assert score is None or 0 <= score <= 1, (answer, reference)
        same = METRICS[name](reference, reference)
        assert same is None or same == 1, reference
