"""Odd images and videos (odd_media.py): each trains, is said, or is refused in one line, in the check as in training."""

import json

import pytest

from tests.odd_media import CASES, LATE, REFUSED, SAID, TRAINS
from tests.samples import assistant, entry, text, user
from util.cost.measure import look
from util.data.lines import DataError
from util.dataset import Examples, Samples
from util.vision import Budget

LONGEST = 600  # characters of a refusal
FACTS = ("cut", "deep", "first")


def test_there_are_many_of_them():
    assert len(CASES) >= 100
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
# A warning of a library would be printed for each file, without its name.
@pytest.mark.filterwarnings("error::UserWarning", "error::RuntimeWarning")
def test_odd_medium(case, processor, tmp_path):
    data = tmp_path / "data.json"
    data.write_text(json.dumps([entry(user([case.make(tmp_path), text("What?")]), assistant("It."))]))
    samples = Samples(Examples([str(data)], processor), processor, Budget(min_pixels=784, max_pixels=28 * 28 * 16))
    (finding,) = look(samples, 100_000, "stop")
    if case.outcome in (TRAINS, SAID):
        assert finding.size, f"refused: {finding.problem}"
        (grid,) = finding.size.grids
        facts = [fact for fact in FACTS if getattr(grid, fact)]
        assert facts == ([case.words] if case.outcome == SAID else []), "what is said of it"
        (medium,) = samples[0].media
        assert medium.grid == grid, "training has other pixels than the check forecasts"
        return
    if case.outcome == REFUSED:
        check_refusal(finding.problem, case, data)
        assert finding.size is None
    if "one shape" in case.words:  # which is looked at once, before training
        return
    with pytest.raises(DataError) as error:
        samples[0]
    check_refusal(str(error.value), case, data)


def check_refusal(said: str, case, data) -> None:
    assert said, "not refused"
    assert case.words in said
    assert said.startswith(f"{data}, sample 0"), "it names the sample"
    assert "\n" not in said.strip(), "one line"
    assert len(said) <= LONGEST
    assert "Traceback" not in said
    if case.outcome == LATE:
        assert ".bmp" in said
