"""Training on media from elsewhere and through the cache: the same numbers, and no decoding twice."""

import functools
import http.server
import json
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import finetune
from tests import runs
from tests.runs import metrics
from util.command_line import UserError
from util.config import Config
from util.data.media import MediaReader
from util.vision import Budget, load, read_grid


def settings(tiny_path: Path, data: Path, directory: Path, **changes) -> Config:
    own = {"data": [str(data)], "epochs": 2, "global_batch_size": 2, "video_max_frames": 768, "video_max_tokens": 64}
    return Config(**runs.settings(tiny_path, directory, **{**own, **changes}))


def conversation(kind: str, path: str) -> dict:
    asked = {"role": "user", "content": [{"type": kind, kind: path}, {"type": "text", "text": "What is it?"}]}
    return {"messages": [asked, {"role": "assistant", "content": path[-5:]}]}


@pytest.fixture
def media(tmp_path, picture, write_video) -> Path:
    """Two pictures and two videos of 720p."""
    folder = tmp_path / "media"
    folder.mkdir()
    for number in range(2):
        Image.fromarray(picture(200, 300, number)).save(folder / f"{number}.jpg")
        still = picture(720, 1400, number)
        frames = [np.ascontiguousarray(still[:, 2 * n : 2 * n + 1280]) for n in range(48)]
        write_video(folder / f"{number}.mp4", frames, 24)
    return folder


def write(file: Path, prefix: str) -> Path:
    paths = [("image", "0.jpg"), ("video", "0.mp4"), ("image", "1.jpg"), ("video", "1.mp4")]
    file.write_text(json.dumps([conversation(kind, f"{prefix}{name}") for kind, name in paths]))
    return file


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture
def server(media):
    """The folder at http://, from the standard library's server, which sends no ranges."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=media)) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/"
        running.shutdown()


def test_training_on_remote_media_is_training_on_local_ones(server, media, tiny_path, tmp_path):
    pytest.importorskip("aiohttp")
    here = finetune.train(settings(tiny_path, write(tmp_path / "a.json", f"{media}/"), tmp_path / "here"))
    for name, changes in {"there": {}, "workers": {"num_workers": 2}, "cached": {"cache_dir": str(tmp_path / "cache")}}.items():  # fmt: skip
        data = write(tmp_path / "b.json", server)
        there = finetune.train(settings(tiny_path, data, tmp_path / name, **changes))
        assert metrics(here, "loss") == metrics(there, "loss"), name
    # two epochs of four media and the sample that is shown at the start: each is missed once
    assert metrics(there, "cache_hit_ratio")[-1] == pytest.approx(5 / 9, abs=1e-4)


def test_a_remote_file_that_is_not_there_is_named_before_anything_is_written(server, tiny_path, tmp_path):
    pytest.importorskip("aiohttp")
    data = tmp_path / "data.json"
    data.write_text(json.dumps([conversation("image", f"{server}gone.jpg")]))
    with pytest.raises(UserError, match=r"data\.json, sample 0: http://.*/gone\.jpg: no such file \(404"):
        finetune.train(settings(tiny_path, data, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_second_epoch_decodes_nothing(media, tiny_path, tmp_path):
    """With the cache the second epoch takes all frames from it, and the losses are the same."""
    data = tmp_path / "videos.json"
    data.write_text(json.dumps([conversation("video", f"{media}/{number}.mp4") for number in (0, 1)] * 3))
    config = settings(tiny_path, data, tmp_path / "plain", video_max_tokens=512, max_pixels=200704)
    plain = finetune.train(config)
    changes = {"cache_dir": str(tmp_path / "cache"), "output_dir": str(tmp_path / "cached")}
    cached = finetune.train(Config(**{**vars(config), **changes}))
    assert metrics(cached, "loss") == metrics(plain, "loss")
    # 12 samples and the one shown at the start, of two videos
    assert metrics(cached, "cache_hit_ratio")[-1] == pytest.approx(11 / 13, abs=1e-4)


def test_the_reader_gives_what_vision_gives(media, tmp_path):
    items = [{"type": "image", "image": f"{media}/0.jpg"}, {"type": "video", "video": f"{media}/0.mp4", "fps": 4.0}]
    budget = Budget(video_max_tokens=128)
    config = Config(cache_dir=str(tmp_path / "cache"))
    for reader in (MediaReader(), MediaReader(config), MediaReader(config)):
        for item, medium in zip(items, reader.each(load, items, budget), strict=True):
            assert (medium.patches == load(item, budget).patches).all()
            assert medium.grid == load(item, budget).grid
        assert reader.each(read_grid, items, budget) == [read_grid(item, budget) for item in items]
    assert reader.cache.statistics()["hits"] == 2
