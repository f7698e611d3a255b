"""The benchmarks of reading videos and of making pixels run, and compare equal work; speeds are not tested."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(script: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "benchmarks" / script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def result_of(done: subprocess.CompletedProcess, file: Path) -> dict:
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == json.loads(file.read_text())
    assert {"command", "commit", "device", "versions", "contenders", "targets"} <= set(result)
    assert str(file.parent) not in json.dumps(result), "a machine's own paths have no place in a result"
    for name in ("torchcodec", "decord"):  # a contender that is absent is null, not missing
        assert result["contenders"][name] is None or isinstance(result["contenders"][name], str)
    return result


@pytest.fixture(scope="module")
def work_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("benchmark")


@pytest.mark.slow
def test_video_reads_the_frames_that_decoding_everything_gives(work_dir):
    file = work_dir / "video.json"
    result = result_of(run("video.py", "--quick", "--work_dir", str(work_dir), "--out", str(file)), file)
    assert len(result["short"]) == 4  # two keyframe intervals, two numbers of frames
    for row in [*result["short"], result["long"]]:
        assert row["difference"]["ours"] == {"mean": 0.0, "largest": 0}
        assert row["milliseconds"]["ours"]["median"] > 0
        assert row["times_as_fast"]["everything"]["median"] > 0
        for name in ("torchcodec", "decord"):
            assert (row["times_as_fast"][name] is None) == (result["contenders"][name] is None)
    memory = result["memory"]
    assert memory is None or memory["frames"] == 2 * 480 // 30  # 16 seconds, 2 frames per second
    assert not list(work_dir.glob("unfinished*"))


@pytest.mark.slow
def test_input_gives_the_same_grids_and_fewer_bytes(work_dir):
    footage = next(work_dir.glob("drawn*_10_*.mp4"), None)
    assert footage, "made by the test before this one"
    file = work_dir / "input.json"
    arguments = ["--quick", "--work_dir", str(work_dir), "--footage", str(footage), "--out", str(file)]
    result = result_of(run("input.py", *arguments), file)
    videos = [row for row in result["rows"] if row["name"].startswith("video")]
    photos = [row for row in result["rows"] if row["name"].startswith("photo")]
    assert len(videos) == 5  # two keyframe intervals drawn, two of footage, one without the cap
    assert len(photos) == 2
    assert all("real footage" in row["name"] for row in videos[2:4])
    for row in photos:
        assert row["fewer_bytes"] == 8
        assert row["difference"]["theirs"]["mean"] < 1  # both resize bicubic: PIL there, torchvision here
        assert row["times_as_fast"]["median"] > 0
    for row in videos:  # qwen-vl-utils needs torchcodec or decord to read a file
        for theirs in row["difference"].values():
            assert theirs["mean"] < 1
        assert row["fewer_bytes"] in (4, None)
