"""The cache of decoded frames: the same pixels, whoever writes, dies, fills the disk or changes a file meanwhile."""

import dataclasses
import errno
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import av
import numpy as np
import PIL
import pytest
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from util import command_line, vision
from util.command_line import UserError
from util.data import cache, keys
from util.data.cache import FrameCache
from util.data.settings import CacheSettings
from util.vision import Budget, Grid, Medium

BUDGET = Budget()
FORK = multiprocessing.get_context("fork")
CHANGES = {"min_pixels": 200_000, "max_pixels": 50_000, "resized_height": 56, "resized_width": 56, "fps": 1.0, "nframes": 4,
           "min_frames": 6, "max_frames": 4, "video_start": 0.5, "video_end": 1.0, "total_pixels": 30_000,
           "video_fps": 1.0, "video_max_frames": 4, "video_max_tokens": 10, "cap_pixels": 3136,
           "model_type": "qwen3_vl"}  # fmt: skip


@pytest.fixture(autouse=True)
def no_warning():
    """A warning that a test does not expect is an error, torch's about memory that is not writable among them."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        warnings.simplefilter("ignore", ResourceWarning)  # Pillow closes a file of which only the header was read late
        yield


@pytest.fixture
def frames(tmp_path) -> FrameCache:
    return FrameCache(tmp_path / "cache", 1.0)


@pytest.fixture(scope="module")
def items(tmp_path_factory, picture, write_video) -> dict[str, dict]:
    """One item of each kind."""
    folder = tmp_path_factory.mktemp("media")
    paths = []
    for number in range(3):
        paths.append(str(folder / f"{number}.jpg"))
        Image.fromarray(picture(300, 400, number)).save(paths[-1])
    clip = write_video(folder / "clip.mp4", [picture(240, 320, number) for number in range(20)], 10)
    return {
        "image": {"type": "image", "image": paths[0]},
        "video": {"type": "video", "video": clip},
        "frames": {"type": "video", "video": paths},
    }


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of 1 MiB of its own."""
    folder = tmp_path / "small_disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("a file system can be mounted by root only")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


class Numbered:
    """Files that stand for media: `read` makes a medium of `patches` patches from the number in an item's path."""

    def __init__(self, folder: Path, patches: int) -> None:
        self.folder, self.patches = folder, patches
        folder.mkdir(exist_ok=True)

    def item(self, number: int) -> dict:
        path = self.folder / str(number)
        if not path.exists():
            path.touch()
        return {"type": "image", "image": str(path)}

    def read(self, item: dict, budget: Budget) -> Medium:
        generator = torch.Generator().manual_seed(int(Path(item["image"]).name))
        pixels = torch.randint(0, 256, (self.patches, 588), dtype=torch.uint8, generator=generator)
        return Medium(pixels, Grid(1, 2, self.patches // 2), is_video=False)

    def is_right(self, frames: FrameCache, number: int) -> bool:
        item = self.item(number)
        return torch.equal(frames.load(item, BUDGET, self.read).patches, self.read(item, BUDGET).patches)


@pytest.fixture
def numbered(tmp_path) -> Numbered:
    return Numbered(tmp_path / "numbered", 400)  # 235 kB each


def refuse(item: dict, budget: Budget):
    raise AssertionError("read again")


def entries(frames: FrameCache) -> list[Path]:
    return sorted(frames.directory.glob("??/*.patches"))


def unfinished(frames: FrameCache) -> list[Path]:
    return sorted(frames.directory.glob("??/.*"))


def used(frames: FrameCache) -> int:
    """Bytes of all files in the folders of entries; a file may go while they are counted."""
    total = 0
    for path in frames.directory.glob("??/*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


def assert_counts(frames: FrameCache, **expected: int) -> None:
    found = frames.statistics()
    assert {name: found[name] for name in expected} == expected


# ---- the same pixels ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["image", "video", "frames"])
@pytest.mark.parametrize("budget", [BUDGET, Budget(video_max_tokens=40)], ids=["plain", "capped"])
def test_a_hit_is_what_decoding_gives(frames, items, kind, budget):
    item = items[kind]
    expected, grid = vision.load(item, budget), vision.read_grid(item, budget)
    assert frames.read_grid(item, budget) == grid
    first = frames.load(item, budget)
    hit = frames.load(item, budget, refuse)
    assert frames.read_grid(item, budget, refuse) == grid
    for medium in (first, hit):
        assert torch.equal(medium.patches, expected.patches)
        assert medium.patches.dtype == torch.uint8
        assert medium.grid == expected.grid == grid
        assert medium.grid.capped is expected.grid.capped
        assert medium.is_video == expected.is_video
    assert frames.statistics() == {
        "hits": 1,
        "misses": 1,
        "stored": 1,
        "not_stored": 0,
        "damaged": 0,
        "evicted": 0,
        "hit_ratio": 0.5,
    }


def test_a_hit_is_mapped(frames, tmp_path):
    """Neither memory nor open files are held, and writing into the tensor does not reach the entry."""
    numbered = Numbered(tmp_path / "numbered", 2**17)  # 77 MB
    item = numbered.item(0)
    expected = frames.load(item, BUDGET, numbered.read).patches.clone()
    frames.load(item, BUDGET, refuse)
    pages, files = int(Path("/proc/self/statm").read_text().split()[1]), len(os.listdir("/proc/self/fd"))
    media = [frames.load(item, BUDGET, refuse) for _ in range(3)]
    growth = (int(Path("/proc/self/statm").read_text().split()[1]) - pages) * os.sysconf("SC_PAGESIZE")
    assert growth < 10e6
    assert len(os.listdir("/proc/self/fd")) == files
    assert Path("/proc/self/maps").read_text().count(str(frames.directory)) == 3
    assert media[0].patches.data_ptr() % 64 == 0
    media[0].patches[:] = 7
    assert torch.equal(media[1].patches, expected)
    assert torch.equal(frames.load(item, BUDGET, refuse).patches, expected)


def test_errors_of_a_medium_are_its_own(frames, tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    for name in ("text.jpg", "absent.jpg"):
        with pytest.raises(ValueError, match=name):
            frames.load({"type": "image", "image": str(tmp_path / name)}, BUDGET)
    assert entries(frames) == []


# ---- keys -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["image", "video", "frames"])
def test_settings_in_the_key(frames, items, kind):
    """A setting that can change the pixels changes the key; one that is left out of the key changes no pixel."""
    item = items[kind]
    key, pixels = frames.key(item, BUDGET), vision.load(item, BUDGET).patches
    left_out = set()
    for name in Budget.__dataclass_fields__:
        budget = dataclasses.replace(BUDGET, **{name: CHANGES[name]})
        if frames.key(item, budget) == key:
            left_out.add(name)
            assert torch.equal(vision.load(item, budget).patches, pixels)
    sampling = {"video_fps", "video_max_frames"}
    assert left_out == {"image": sampling | {"video_max_tokens"}, "video": set(), "frames": sampling}[kind]
    names = keys.NUMBER_KEYS + {"image": (), "video": keys.VIDEO_KEYS, "frames": ("total_pixels",)}[kind]
    changed = {frames.key({**item, name: CHANGES[name]}, BUDGET) for name in names}
    assert len(changed | {key}) == len(names) + 1
    assert frames.key({**item, "text": ""}, BUDGET) == key
    assert frames.key(dict(reversed(item.items())), BUDGET) == key


def test_a_setting_that_is_new_some_day_counts(frames, items):
    @dataclasses.dataclass(frozen=True)
    class Later(Budget):
        sharpen: int = 0

    for kind in ("image", "video", "frames"):
        assert frames.key(items[kind], Later(sharpen=1)) != frames.key(items[kind], Later())


def test_code_that_makes_the_pixels_is_in_the_key(frames, items, monkeypatch):
    def changed(target, name: str, value) -> set[str]:
        before = {kind: frames.key(item, BUDGET) for kind, item in items.items()}
        with monkeypatch.context() as patch:
            patch.setattr(target, name, value)
            return {kind for kind, item in items.items() if frames.key(item, BUDGET) != before[kind]}

    everything = {"image", "video", "frames"}
    assert changed(cache, "VERSION", 0) == everything
    assert changed(torch, "__version__", "0") == everything
    assert changed(torchvision, "__version__", "0") == everything
    assert changed(vision, "FRAME_TOKENS", (1, 2)) == everything
    assert changed(vision, "MERGE", 4) == everything
    assert changed(av, "__version__", "0") == {"video"}
    assert changed(PIL, "__version__", "0") == {"image", "frames"}


@pytest.mark.parametrize("is_list", [False, True])
def test_a_changed_file_is_read_again(frames, tmp_path, is_list):
    path = tmp_path / "one.bmp"
    item = {"type": "video", "video": [str(path)]} if is_list else {"type": "image", "image": str(path)}
    for colour in ("red", "blue"):  # a BMP is as large, whatever is in it
        Image.new("RGB", (56, 56), colour).save(path)
        os.utime(path, ns=(0, 1 + (colour == "blue")))
        for _ in range(2):
            assert torch.equal(frames.load(item, BUDGET).patches, vision.load(item, BUDGET).patches)
    assert_counts(frames, hits=2, misses=2, stored=2)


def test_a_file_that_changes_while_it_is_read_is_not_stored(frames, numbered):
    def read(item: dict, budget: Budget) -> Medium:
        medium = numbered.read(item, budget)
        Path(item["image"]).write_text("changed")
        return medium

    frames.load(numbered.item(0), BUDGET, read)
    assert entries(frames) == []
    assert_counts(frames, misses=1, not_stored=1)


def test_one_file_by_two_paths_is_one_entry(frames, items, tmp_path):
    (tmp_path / "link.jpg").symlink_to(items["image"]["image"])
    assert frames.key({"type": "image", "image": str(tmp_path / "link.jpg")}, BUDGET) == frames.key(
        items["image"], BUDGET
    )
    single, listed = ({"type": "video", "video": path} for path in (items["image"]["image"], [items["image"]["image"]]))
    assert frames.key(single, BUDGET) != frames.key(listed, BUDGET)


def test_the_identity_of_a_url_comes_from_outside(tmp_path, numbered):
    tags = {"s3://bucket/0": "one", "s3://bucket/1": None}
    frames = FrameCache(tmp_path / "cache", 1.0, url_identity=tags.get)
    first, second = ({"type": "image", "image": url} for url in tags)
    frames.load(first, BUDGET, numbered.read)
    frames.load(first, BUDGET, refuse)
    tags["s3://bucket/0"] = "two"
    for item in (first, second, second):
        with pytest.raises(AssertionError, match="read again"):
            frames.load(item, BUDGET, refuse)
    frames.load(second, BUDGET, numbered.read)
    assert_counts(frames, hits=1, stored=1, not_stored=1)
    assert FrameCache(tmp_path / "cache", 1.0).key(first, BUDGET) is None


# ---- many writers, crashes, damage ----------------------------------------------------------------------------------


def load_all(frames: FrameCache, numbered: Numbered, numbers: list[int], wrong) -> None:
    torch.set_num_threads(1)  # as a data worker does: the threads of the forked process are not here
    for number in numbers:
        if not numbered.is_right(frames, number):
            wrong.value = 1


@pytest.mark.parametrize("kind", [FORK.Process, threading.Thread])
def test_concurrent_writers(frames, numbered, kind):
    wrong = FORK.Value("i", 0)
    numbers = list(range(25))
    for number in numbers:
        numbered.item(number)
    writers = [kind(target=load_all, args=(frames, numbered, numbers, wrong)) for _ in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert wrong.value == 0
    assert (len(entries(frames)), unfinished(frames)) == (25, [])
    if kind is not threading.Thread:  # threads share a row of counts, and may lose one
        found = frames.statistics()
        assert found["hits"] + found["misses"] == 100
        assert found["misses"] == found["stored"] >= 25
        assert found["damaged"] == found["not_stored"] == 0
    load_all(frames, numbered, numbers, wrong)
    assert wrong.value == 0


def store_for_ever(frames: FrameCache, numbered: Numbered) -> None:
    torch.set_num_threads(1)  # as a data worker does: the threads of the forked process are not here
    while True:
        number = random.randrange(10)
        frames._store(frames.key(numbered.item(number), BUDGET), numbered.read(numbered.item(number), BUDGET))


def test_writers_killed_at_any_moment(frames, tmp_path):
    numbered = Numbered(tmp_path / "numbered", 8000)  # 4.7 MB each, so that many die while they write
    numbers = list(range(10))
    left = rounds = 0
    while rounds < 10 or (left == 0 and rounds < 100):
        random.seed(rounds)
        rounds += 1
        writers = [FORK.Process(target=store_for_ever, args=(frames, numbered)) for _ in range(2)]
        for writer in writers:
            writer.start()
        deadline = time.monotonic() + 30
        while not unfinished(frames):
            assert time.monotonic() < deadline, f"round {rounds}: nobody writes"
        time.sleep(random.uniform(0, 0.02))
        for writer in writers:
            os.kill(writer.pid, signal.SIGKILL)
            writer.join()
        left += len(unfinished(frames))
        frames = FrameCache(frames.directory, 1.0)
        assert unfinished(frames) == []
    assert left > 0
    assert entries(frames)
    load_all(frames, numbered, numbers, wrong := FORK.Value("i", 0))
    assert wrong.value == 0
    assert_counts(frames, damaged=0)


def test_what_a_living_writer_has_not_finished_stays(frames, numbered, monkeypatch):
    def replace_later(source: Path, target: Path) -> None:
        other = FrameCache(frames.directory, 1.0)  # another run starts, and tidies up
        assert unfinished(other) == [source]
        os.rename(source, target)

    monkeypatch.setattr(cache.os, "replace", replace_later)
    assert numbered.is_right(frames, 0)
    assert_counts(frames, stored=1)


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


DAMAGE = {
    **{f"header, byte {byte}": lambda path, byte=byte: flip(path, byte) for byte in range(36)},
    "first pixel": lambda path: flip(path, 64),
    "last pixel": lambda path: flip(path, -1),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "a page of zeros": lambda path: path.write_bytes(path.read_bytes()[:4096] + bytes(4096) + path.read_bytes()[8192:]),
    "empty": lambda path: path.write_bytes(b""),
    "header only": lambda path: os.truncate(path, 64),
    "half a header": lambda path: os.truncate(path, 20),
    "a byte short": lambda path: os.truncate(path, path.stat().st_size - 1),
    "a byte too many": lambda path: path.write_bytes(path.read_bytes() + b"0"),
}


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_a_damaged_entry_is_rebuilt(frames, items, damage):
    expected = frames.load(items["image"], BUDGET).patches.clone()
    [path] = entries(frames)
    DAMAGE[damage](path)
    assert frames.read_grid(items["image"], BUDGET) == vision.read_grid(items["image"], BUDGET)
    assert torch.equal(frames.load(items["image"], BUDGET).patches, expected)
    assert torch.equal(frames.load(items["image"], BUDGET, refuse).patches, expected)
    assert_counts(frames, hits=1, misses=2, stored=2, damaged=1)


def test_an_entry_under_another_name_is_damaged(frames, numbered):
    assert numbered.is_right(frames, 0)
    other = frames._path(frames.key(numbered.item(1), BUDGET))
    other.parent.mkdir(exist_ok=True)
    entries(frames)[0].rename(other)
    assert numbered.is_right(frames, 1)
    assert_counts(frames, damaged=1)


def test_an_entry_that_cannot_be_read(frames, numbered, monkeypatch):
    """A bad block counts as damage; too many open files do not."""
    assert numbered.is_right(frames, 0)
    for number, is_there in ((errno.EMFILE, True), (errno.EIO, False)):

        def fail(*arguments, number=number, **options):
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            patch.setattr(cache, "open", fail, raising=False)
            assert frames._find(frames.key(numbered.item(0), BUDGET), with_pixels=True) is None
        assert len(entries(frames)) == is_there
        assert len(caught) == is_there
    assert_counts(frames, damaged=1)


# ---- a disk that takes no more --------------------------------------------------------------------------------------


def assert_goes_on(frames: FrameCache, numbered: Numbered, reason: str, stored: int) -> None:
    """Five media are right; `stored` of them are kept; one warning says why not more; nothing unfinished stays."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert all(numbered.is_right(frames, number) for number in range(100, 105))
    assert [reason in str(warning.message) for warning in caught] == [True]
    assert "--cache_dir" in str(caught[0].message)
    assert unfinished(frames) == []
    assert_counts(frames, stored=stored, not_stored=5 - stored)


def test_full_disk(small_disk, numbered, monkeypatch):
    monkeypatch.setattr(cache, "PAUSE_SECONDS", 0)
    frames = FrameCache(small_disk, 1.0)
    assert_goes_on(frames, numbered, "No space left on device", stored=4)
    assert all(numbered.is_right(frames, number) for number in range(100, 105))
    assert_counts(frames, hits=4)
    entries(frames)[0].unlink()  # somebody makes room
    assert all(numbered.is_right(frames, number) for number in range(100, 105))
    assert_counts(frames, stored=5)


def test_folder_that_becomes_read_only(small_disk, numbered):
    frames = FrameCache(small_disk, 1.0)
    assert numbered.is_right(frames, 0)
    os.utime(entries(frames)[0], (0, 0))  # a hit would mark it as used
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert numbered.is_right(frames, 0)
    with pytest.warns(RuntimeWarning, match="Read-only file system"):
        assert numbered.is_right(frames, 1)
    assert numbered.is_right(frames, 2)
    assert_counts(frames, hits=1, stored=1, not_stored=2)
    with pytest.raises(UserError, match="Read-only file system"):
        FrameCache(small_disk, 1.0)


@pytest.mark.parametrize("call", ["replace", "makedirs", "pwrite"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_call_that_fails(frames, numbered, monkeypatch, call, number):
    def fail(*arguments, **options):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(cache.os, call, fail)
        assert_goes_on(frames, numbered, os.strerror(number), stored=0)
    assert numbered.is_right(frames, 100)
    assert_counts(frames, stored=0)  # it pauses, so that a full disk is not filled with each medium anew
    frames._paused_until = 0.0
    assert numbered.is_right(frames, 100)
    assert_counts(frames, stored=1)


def store_under_a_limit(frames: FrameCache, numbered: Numbered, failed) -> None:
    torch.set_num_threads(1)  # as a data worker does: the threads of the forked process are not here
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        assert_goes_on(frames, numbered, "File too large", stored=0)
        failed.value = 0
    finally:
        os._exit(0)


def test_limit_on_the_size_of_a_file(frames, numbered):
    failed = FORK.Value("i", 1)
    process = FORK.Process(target=store_under_a_limit, args=(frames, numbered, failed))
    process.start()
    process.join()
    assert failed.value == 0
    assert (entries(frames), unfinished(frames)) == ([], [])
    assert_counts(frames, not_stored=5)


def test_folder_that_disappears(frames, numbered):
    """It is made again where that is possible."""
    assert numbered.is_right(frames, 0)
    for path in (*entries(frames), frames.directory / "lock"):
        path.unlink()
    entries_folder = next(frames.directory.iterdir())
    entries_folder.rmdir()
    frames.directory.rmdir()
    assert numbered.is_right(frames, 0)
    assert numbered.is_right(frames, 0)
    assert_counts(frames, stored=2, hits=1)


# ---- the cap --------------------------------------------------------------------------------------------------------


def test_the_cap_holds_and_the_least_recently_used_goes(tmp_path, numbered):
    size = 400 * 588 + 64
    frames = FrameCache(tmp_path / "cache", 10 * size / 2**30)
    for number in range(10):
        assert numbered.is_right(frames, number)
        path = frames._path(frames.key(numbered.item(number), BUDGET))
        os.utime(path, (1000 + number, path.stat().st_mtime))
    assert len(entries(frames)) == 10
    (tmp_path / "cache" / "ab").mkdir(exist_ok=True)
    others = [tmp_path / "cache" / name for name in ("holiday.jpg", "ab/notes.txt", "ab/.hidden")]
    for path in others:
        path.write_text("not ours")
    held = [frames.load(numbered.item(number), BUDGET, refuse) for number in (0, 1)]  # now they were used last
    assert numbered.is_right(frames, 10)
    stays = [number for number in range(11) if frames._path(frames.key(numbered.item(number), BUDGET)).exists()]
    assert stays == [0, 1, 3, 4, 5, 6, 7, 8, 9, 10]
    assert_counts(frames, evicted=1)
    smaller = FrameCache(tmp_path / "cache", 3 * size / 2**30)  # a lower cap holds from the start
    stays = [number for number in range(11) if frames._path(frames.key(numbered.item(number), BUDGET)).exists()]
    assert stays == [0, 1, 10]
    assert_counts(smaller, evicted=7)
    FrameCache(tmp_path / "cache", 1e-9)
    assert entries(frames) == []
    for number, medium in enumerate(held):  # what is mapped outlives its file
        assert torch.equal(medium.patches, numbered.read(numbered.item(number), BUDGET).patches)
    assert [path.read_text() for path in others] == ["not ours"] * 3


def test_a_hit_marks_an_entry_at_most_once_a_minute(frames, numbered, monkeypatch):
    assert numbered.is_right(frames, 0)
    [path] = entries(frames)
    written = path.stat().st_mtime
    times = []
    real = os.utime
    monkeypatch.setattr(cache.os, "utime", lambda *arguments, **options: (times.append(1), real(*arguments, **options)))
    for _ in range(3):
        assert numbered.is_right(frames, 0)
    assert times == []
    real(path, (time.time() - 61, written))
    for _ in range(3):
        assert numbered.is_right(frames, 0)
    assert times == [1]
    assert time.time() - path.stat().st_atime < 10
    assert path.stat().st_mtime == written


def test_a_medium_above_the_cap_is_not_stored(tmp_path, numbered):
    assert_goes_on(FrameCache(tmp_path / "cache", 1e-5), numbered, "above --cache_max_gib", stored=0)


def test_many_writers_stay_below_the_cap(tmp_path, numbered):
    frames = FrameCache(tmp_path / "cache", 12 * 400 * 588 / 2**30)
    wrong = FORK.Value("i", 0)
    order = [number % 40 for number in range(80)]
    for number in range(40):
        numbered.item(number)
    writers = [FORK.Process(target=load_all, args=(frames, numbered, order[start:], wrong)) for start in (0, 10, 20)]
    for writer in writers:
        writer.start()
    most = 0
    while any(writer.is_alive() for writer in writers):
        most = max(most, used(frames))
        time.sleep(0.002)
    assert wrong.value == 0
    # Files are counted one after the other, so one that is deleted and one that took its place may both be seen.
    assert 0 < most <= frames.max_bytes + 3 * 400 * 588
    assert used(frames) <= frames.max_bytes
    assert frames.statistics()["evicted"] > 20


def test_entries_are_looked_at_rarely(tmp_path, numbered, monkeypatch):
    """A tenth of the cap becomes free at a time; a lock file that says nothing, or too much, is put right."""
    looks = []
    real = FrameCache._tidy
    monkeypatch.setattr(FrameCache, "_tidy", lambda self, *room: (looks.append(1), real(self, *room))[1])
    frames = FrameCache(tmp_path / "cache", 50.01 * (400 * 588 + 64) / 2**30)
    assert all(numbered.is_right(frames, number) for number in range(100))
    assert len(looks) == 1 + 10
    for first, content in ((200, b""), (300, b"\xff" * 8), (400, b"half")):
        (frames.directory / "lock").write_bytes(content)
        looks.clear()
        for path in entries(frames)[:5]:
            path.unlink()
        assert all(numbered.is_right(frames, number) for number in range(first, first + 3))
        assert looks == [1]


# ---- workers, settings, time ----------------------------------------------------------------------------------------


class Loads(Dataset):
    def __init__(self, frames: FrameCache, items: list[dict]) -> None:
        self.frames, self.items = frames, items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.frames.load(self.items[index], BUDGET).patches


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_statistics_arrive_from_data_workers(frames, items, start):
    expected = [vision.load(item, BUDGET).patches for item in items.values()]
    loader = DataLoader(
        Loads(frames, list(items.values())),
        batch_size=None,
        num_workers=2,
        multiprocessing_context=start,
        persistent_workers=True,
    )
    for epoch in range(2):
        for found, patches in zip(loader, expected, strict=True):
            assert torch.equal(found, patches)
        assert_counts(frames, hits=3 * epoch, misses=3, stored=3)
    assert frames.statistics()["hit_ratio"] == 0.5


def test_a_folder_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("")
    for path, reason in (
        (tmp_path / "file", "File exists"),
        (tmp_path / "file" / "cache", "Not a directory"),
        ("/proc/cache", ""),
    ):
        with pytest.raises(UserError, match=f"--cache_dir {path}: must be a folder .*{reason}.*name another one"):
            FrameCache(path, 1.0)
    for size in (0.0, -1.0, float("nan")):
        with pytest.raises(UserError, match=r"--cache_max_gib .* must be above 0"):
            FrameCache(tmp_path / "cache", size)
    assert not (tmp_path / "cache").exists()


def open_as_nobody(path: Path, failed) -> None:
    torch.set_num_threads(1)  # as a data worker does: the threads of the forked process are not here
    os.setuid(65534)
    try:
        FrameCache(path, 1.0)
    except UserError as error:
        failed.value = "Permission denied" not in str(error)
    finally:
        os._exit(0)


def test_a_folder_of_somebody_else(tmp_path):
    if os.getuid() != 0:
        pytest.skip("only root can become somebody else")
    for path in (tmp_path, tmp_path / "below"):
        failed = FORK.Value("i", 1)
        process = FORK.Process(target=open_as_nobody, args=(path, failed))
        process.start()
        process.join()
        assert failed.value == 0


def test_settings():
    made = command_line.parse(CacheSettings, "", ["--cache_dir", "x", "--cache_max_gib", "2.5"])
    assert (made.cache_dir, made.cache_max_gib) == ("x", 2.5)
    assert CacheSettings().cache_dir is None
    heavy = "import sys, util.data.cache; sys.exit(bool({'torch', 'numpy', 'PIL', 'av'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", heavy], check=True, cwd=Path(__file__).parent.parent)


def test_the_second_pass_over_videos_takes_a_tenth(frames, picture, write_video, tmp_path):
    still = picture(720, 1280)
    path = write_video(tmp_path / "0.mp4", [np.roll(still, 7 * number, axis=1) for number in range(40)], 10)
    shutil.copy(path, tmp_path / "1.mp4")
    clips = [{"type": "video", "video": str(tmp_path / f"{number}.mp4")} for number in range(2)]
    seconds = []
    for _ in range(2):
        start = time.process_time()
        copies = [torch.cat([frames.load(clip, BUDGET).patches]) for clip in clips]  # as the collator copies them
        seconds.append(time.process_time() - start)
    assert_counts(frames, hits=2, misses=2)
    assert all(copy.shape[1] == 1176 for copy in copies)
    print(f"first pass {seconds[0]:.3f} s, second {seconds[1]:.3f} s, ratio {seconds[1] / seconds[0]:.4f}")
    assert seconds[1] <= 0.1 * seconds[0]
