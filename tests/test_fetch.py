"""Media from anywhere, against servers on loopback that this file starts: one of its own, and moto's S3 behind it.

The server of its own injects faults: answers of 503, silence beyond the time limit, connections cut amid the body.
"""

import base64
import contextlib
import functools
import http.client
import importlib.util
import io
import json
import os
import pickle
import random
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from tests.test_video_reader import FILES, encode, h264
from util import vision
from util.command_line import parse
from util.data import fetch
from util.data.fetch import FetchError, FetchSettings, identity, is_remote, local_path, localise, open_media, printable
from util.data.video_reader import VideoError, VideoReader

BASE = FetchSettings()
QUICK = FetchSettings(fetch_retries=2, fetch_timeout=5)
SECRET = "wJalrXUtnFEMI"


def lacks(package: str) -> bool:
    return importlib.util.find_spec(package) is None


needs_http = pytest.mark.skipif(lacks("aiohttp"), reason="http needs the package aiohttp")
needs_s3 = pytest.mark.skipif(lacks("s3fs") or lacks("moto"), reason="needs the packages s3fs and moto[server]")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Short waits, no proxy, and no connection left from another test."""
    monkeypatch.setattr(fetch, "FIRST_WAIT", 0.02)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    forget_connections(monkeypatch)


KEPT = []  # as in a run, where no connection is ever dropped (see `fetch.connect`)


def forget_connections(monkeypatch) -> None:
    KEPT.append(functools.cache(fetch.connect.__wrapped__))
    monkeypatch.setattr(fetch, "connect", KEPT[-1])


# ---- servers --------------------------------------------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    """Serves `files` (path -> bytes), or passes requests on to `behind`; counts, and injects the faults of `fault`."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.statuses: dict[str, int] = {}  # path -> the status that it always answers with
        self.etags: dict[str, str] = {}
        self.dates: dict[str, str] = {}
        self.ranges = self.sizes = True
        self.behind: int | None = None  # port
        self.fault = lambda path: None  # -> None, "503", "silence", "cut"
        self.pause = 0.0  # seconds, before every answer
        self.silence = 2.0  # seconds
        self.lock = threading.Lock()
        self.requests: list[str] = []
        self.sent = self.running = self.most_running = 0
        self.faults: list[str] = []
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{path}"

    def add(self, path: str, content: bytes) -> str:
        self.files[f"/{path}"] = content
        return self.url(path)

    def handle_error(self, request, client_address) -> None:
        pass  # a client that went away, or a cut connection


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def log_message(self, *arguments) -> None:
        pass

    def do_GET(self) -> None:
        server, path = self.server, self.path.partition("?")[0]
        with server.lock:
            server.requests.append(f"{self.command} {path}")
            server.running += 1
            server.most_running = max(server.most_running, server.running)
            fault = server.fault(path)
            if fault:
                server.faults.append(fault)
        try:
            time.sleep(server.pause)
            if fault == "silence":
                time.sleep(server.silence)
            status, headers, body = (503, {}, b"") if fault == "503" else self.answer(path)
        finally:
            with server.lock:  # before the answer leaves: the client may send its next request the moment it is here
                server.running -= 1
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if server.sizes and "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.close_connection = not server.sizes or fault is not None
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "cut":
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            # Not the orderly end of a connection, but a reset.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return
        with server.lock:  # before the body leaves: the test may look the moment its last byte is here
            server.sent += len(body)
        self.wfile.write(body)

    do_HEAD = do_GET

    def answer(self, path: str) -> tuple[int, dict, bytes]:
        server = self.server
        if server.behind:
            connection = http.client.HTTPConnection("127.0.0.1", server.behind, timeout=20)
            connection.request(self.command, self.path, headers=dict(self.headers))
            answer = connection.getresponse()
            drop = ("connection", "transfer-encoding", "date", "server")
            headers = {name: value for name, value in answer.getheaders() if name.lower() not in drop}
            body = answer.read()
            connection.close()
            return answer.status, headers, body
        if path in server.statuses:
            return server.statuses[path], {}, b"no"
        if path not in server.files:
            return 404, {}, b"nothing here"
        body = server.files[path]
        told = {"ETag": server.etags.get(path), "Last-Modified": server.dates.get(path)}
        headers = {name: value for name, value in told.items() if value}
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not (found and server.ranges):
            return 200, headers, body
        start, end = int(found[1]), min(int(found[2]) + 1, len(body))
        if start >= end:
            return 416, {"Content-Range": f"bytes */{len(body)}"}, b""
        return 206, {**headers, "Content-Range": f"bytes {start}-{end - 1}/{len(body)}"}, body[start:end]


@pytest.fixture
def server():
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def moto():
    """The port of moto's S3 server with the bucket `media`."""
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port = chosen.getsockname()[1]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, "-m", "moto.server", "-p", str(port)], **quiet)
    try:
        for _ in range(300):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/moto-api/", timeout=5).close()
                break
            time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
def s3(moto, server, monkeypatch):
    """boto3's client of the store; `server`, which injects faults, stands before the store for everyone else."""
    import boto3

    server.behind = moto
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    given = {"AWS_ENDPOINT_URL": server.url(""), "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": SECRET,
             "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
             "AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull}  # fmt: skip
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{moto}")
    client.create_bucket(Bucket="media")
    return client


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def png(seed: int, side: int = 64) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def image(path: str) -> dict:
    return {"type": "image", "image": path}


# ---- paths, file:// and data: ---------------------------------------------------------------------------------------


def test_settings_are_flags_and_travel_to_workers():
    settings = parse(FetchSettings, "", ["--fetch_concurrency", "3", "--fetch_timeout", "2.5"])
    assert pickle.loads(pickle.dumps(settings)) == FetchSettings(3, 5, 2.5)


def test_which_paths_are_remote():
    for path in (
        "photos/1.jpg",
        "/photos/1.jpg",
        "file:///photos/1.jpg",
        "a:b.jpg",
        "1://x",
        "C:\\x.jpg",
        "data/1.jpg",
    ):
        assert not is_remote(path), path
    for path in ("http://h/1.jpg", "HTTPS://h/1.jpg", "s3://b/1", "oss://b/1", "gs://b/1", "data:image/png;base64,AA"):
        assert is_remote(path), path


def test_file_scheme(tmp_path):
    plain, odd = tmp_path / "a b.png", tmp_path / "100%25.png"
    plain.write_bytes(png(0))
    odd.write_bytes(png(1))
    assert open_media(f"file://{tmp_path}/a%20b.png", BASE) == str(plain)
    assert open_media(f"file://localhost{tmp_path}/a%20b.png", BASE) == str(plain)
    assert open_media(f"file://{tmp_path}/a b.png", BASE) == str(plain)
    assert open_media(f"file://{odd}", BASE) == str(odd)  # written without encoding, and a file of that very name
    assert local_path("file://photos/1.png") == "photos/1.png"
    assert open_media(str(plain), BASE) == str(plain)


def test_messages_hold_no_secret():
    assert printable(f"https://me:{SECRET}@h/a.jpg?X-Amz-Signature={SECRET}#{SECRET}") == "https://h/a.jpg?..."
    assert printable("s3://bucket/a?b#c.jpg") == "s3://bucket/a?b#c.jpg"


def test_data_uri(tmp_path):
    content = png(0)
    path = "data:image/png;base64," + base64.b64encode(content).decode()
    file = open_media(path, BASE)
    assert file.read() == file.reopen().read() == content
    assert len(str(file)) == 80
    assert str(file) == repr(file) == file.name == path[:77] + "..."
    assert vision.open_image(open_media(path, BASE)).size == (64, 64)
    assert open_media("data:,a%20b", BASE).read() == b"a b"
    assert identity(path, BASE) != identity(path[:-8], BASE)

    video = encode(tmp_path / "a.mp4", 20, "libx264", 5, options=h264())
    path = "data:video/mp4;base64," + base64.b64encode(video.read_bytes()).decode()
    assert_same_frames(VideoReader(video), VideoReader(open_media(path, BASE)), [0, 7, 19])


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("data:image/png;base64,AAA", "broken base64 .*encode the file anew"),
        ("data:image/png;base64,A*==", "broken base64"),
        ("data:image/png;base64", "no comma in it; a data URI is data:image/png;base64,AAAA"),
    ],
)
def test_data_uris_that_are_none(path, reason):
    with pytest.raises(FetchError, match=f"^data:image/png.*: {reason}"):
        localise([image(path)], BASE)


def test_data_uri_that_is_no_image():
    [item] = localise([image("data:image/png;base64,aGVsbG8=")], BASE)
    with pytest.raises(ValueError, match=r"^data:image/png;base64,aGVsbG8=: not a readable image"):
        vision.open_image(item["image"])


def test_local_items_stay_as_they_are(monkeypatch):
    monkeypatch.setattr(fetch, "ThreadPoolExecutor", None)  # calling it would fail
    items = [{"type": "image", "image": "a.png", "min_pixels": 9}, {"type": "video", "video": ["a.png", "b.png"]}]
    assert localise(items, BASE) == items


# ---- http -----------------------------------------------------------------------------------------------------------


@needs_http
def test_reads_like_a_local_file(server):
    content = noise(700_000)
    file = open_media(server.add("noise", content), QUICK)
    local, choose = io.BytesIO(content), random.Random(0)
    for _ in range(200):
        position, length = choose.randrange(len(content) + 1000), choose.choice([0, 1, 100, 70_000, 200_000])
        assert file.seek(position) == local.seek(position)
        assert file.read(length) == local.read(length)
        assert file.tell() == local.tell()
    assert file.seek(-5, 2) == len(content) - 5
    assert file.read() == content[-5:]
    other = file.reopen()
    assert (other.tell(), other.read(3), file.tell()) == (0, content[:3], len(content))
    assert server.sent == len(content)  # no byte twice
    assert file.seek(-1, 1) == local.seek(0, 2) - 1


@needs_http
def test_reading_on_takes_few_requests(server):
    file = open_media(server.add("noise", noise(20_000_000)), QUICK)
    while file.read(2**15):
        pass
    assert len(server.requests) < 12
    assert server.sent == 20_000_000


@needs_http
def test_image_headers_are_enough_for_a_size(server):
    content = png(0, 1000)
    items = [image(server.add(f"{i}.png", content)) for i in range(3)]
    for item in localise(items, QUICK, whole_images=False):
        assert vision.open_image(item["image"]).size == (1000, 1000)
    assert server.sent < len(content) / 2
    for item in localise(items, QUICK):
        assert item["image"].read() == content


@needs_http
@pytest.mark.parametrize("sizes", [True, False], ids=["sizes", "no sizes"])
def test_server_without_ranges(server, tmp_path, sizes):
    server.ranges, server.sizes = False, sizes
    video = encode(tmp_path / "a.mp4", 60, "libx264", 5, options=h264())
    content = noise(300_000)
    items = localise([image(server.add("noise", content)), {"type": "video", "video": server.add("a.mp4", video.read_bytes())}], QUICK)  # fmt: skip
    assert items[0]["image"].read() == content
    assert_same_frames(VideoReader(video), VideoReader(items[1]["video"]), [0, 30, 59])
    file = open_media(server.url("noise"), QUICK)
    file.seek(200_000)
    assert file.read() == content[200_000:]
    assert file.content().read() == content
    assert server.sent < 5 * (len(content) + video.stat().st_size)


@needs_http
def test_empty_file(server):
    assert open_media(server.add("empty", b""), QUICK).read() == b""


@needs_http
@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (404, "no such file \\(404\\); correct the path"),
        (403, "access denied \\(403\\); the address may have expired"),
        (401, "access denied \\(401\\)"),
        (400, "refused \\(400\\); check the address"),
    ],
)
def test_what_does_not_pass_is_not_tried_again(server, status, reason):
    server.statuses["/a.png"] = status
    path = server.url(f"a.png?signature={SECRET}").replace("//", f"//me:{SECRET}@")
    with pytest.raises(FetchError, match=rf"^http://127.0.0.1:\d+/a.png\?...: {reason}") as caught:
        localise([image(path)], QUICK)
    assert len(server.requests) == 2  # HEAD, and GET because some servers know no HEAD
    assert SECRET not in "".join(traceback.format_exception(caught.value))
    assert isinstance(caught.value, ValueError)


@needs_http
def test_what_may_pass_is_tried_again_and_then_counted(server):
    path = server.add("a.png", png(0))
    server.fault = lambda path: "503"
    with pytest.raises(FetchError, match=r"a.png: the server answers 503 \(tried 3 times in 0 s\); see that the"):
        localise([image(path)], QUICK)
    assert server.requests.count("HEAD /a.png") == 3
    with pytest.raises(FetchError, match=r"503 \(tried once\)"):
        localise([image(path)], FetchSettings(fetch_retries=0))


@needs_http
def test_no_server():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(FetchError, match=r": the connection failed \(.*\) \(tried 3 times"):
        open_media(f"http://127.0.0.1:{port}/a.png", QUICK)


@needs_http
def test_silence_ends_at_the_time_limit(server):
    path = server.add("a.png", png(0))
    server.silence = 10
    server.fault = lambda path: "silence"
    with pytest.raises(FetchError, match=r"no answer within 0.3 s \(tried 2 times"):
        localise([image(path)], FetchSettings(fetch_retries=1, fetch_timeout=0.3))


@needs_http
def test_nobody_waits_alike(monkeypatch):
    """Full jitter: waits are spread over the whole of a range that doubles up to a bound."""
    waits = []
    monkeypatch.setattr(fetch, "FIRST_WAIT", 0.5)
    monkeypatch.setattr(fetch.time, "sleep", waits.append)
    random.seed(0)
    state = random.getstate()
    for _ in range(200):
        with pytest.raises(FetchError, match="tried 9 times"):
            fetch.Source._persist(SourceThatFails(), SourceThatFails.request)
    assert random.getstate() == state  # training draws from it
    for number, each in enumerate(np.array(waits).reshape(200, 8).T):
        bound = min(20, 0.5 * 2**number)
        assert each.max() <= bound
        assert each.max() > 0.9 * bound
        assert each.min() < 0.1 * bound


class SourceThatFails:
    path, settings = "s3://bucket/a", FetchSettings(fetch_retries=8)

    def request():
        raise ConnectionResetError


@needs_http
def test_order_and_bound_of_concurrency(server):
    contents = [png(i, 8) for i in range(30)]
    paths = [server.add(f"{i}.png", content) for i, content in enumerate(contents)]
    server.pause = 0.02
    items = [image(path) for path in paths[:20]]
    items.insert(3, {"type": "image", "image": "local.png"})
    items.insert(7, {"type": "video", "video": [paths[20], "local.png", *paths[21:]], "fps": 2})
    got = localise(items, FetchSettings(fetch_concurrency=4))
    assert got[3] == items[3]
    assert (got[7]["fps"], got[7]["video"].pop(1)) == (2, "local.png")
    files = [item["image"] for item in got[:3] + got[4:7] + got[8:]] + got[7]["video"]
    assert [file.read() for file in files] == contents
    assert [str(file) for file in files] == paths
    assert items[0]["image"] == paths[0]  # what was given is not changed
    assert server.most_running == 4
    server.most_running = 0
    localise([image(path) for path in paths[:5]], FetchSettings(fetch_concurrency=1))
    assert server.most_running == 1


@needs_http
def test_first_failure_in_order_is_told(server):
    server.files = {f"/{i}.png": png(i) for i in (0, 2, 4)}
    with pytest.raises(FetchError, match=r"/1.png: no such file"):
        localise([image(server.url(f"{i}.png")) for i in range(5)], QUICK)


@needs_http
def test_change_while_reading(server, tmp_path):
    path, content = server.add("a", noise(300_000)), noise(300_000, 1)
    for before, after, new in [('"1"', '"2"', content), ('"1"', '"1"', content[:-1]), ('"1"', '"1"', content[:500])]:
        server.add("a", noise(300_000))
        server.etags["/a"] = before
        file, key = open_media(path, QUICK), identity(path, QUICK)
        assert identity(path, QUICK) == key
        file.read(10)
        server.add("a", new)
        server.etags["/a"] = after
        assert identity(path, QUICK) != key
        with pytest.raises(FetchError, match=r"changed while it was read|shorter than when it was opened"):
            file.read()
        with pytest.raises(FetchError):  # and stays so, for other cursors too
            file.reopen().read()


@needs_http
def test_servers_behind_one_address_may_make_their_own_etags(server):
    """The same file, but an ETag of inode or machine: its modification time tells that it is the same."""
    content = noise(300_000)
    path = server.add("a", content)
    server.etags["/a"], server.dates["/a"] = '"1"', "Wed, 21 Oct 2015 07:28:00 GMT"
    file = open_media(path, QUICK)
    server.etags["/a"] = '"2"'
    assert file.read() == content
    file = open_media(path, QUICK)
    server.etags["/a"], server.dates["/a"] = '"3"', "Wed, 21 Oct 2015 07:28:01 GMT"
    with pytest.raises(FetchError, match="changed while it was read"):
        file.read()


def test_identity_of_local_files(tmp_path):
    file = tmp_path / "a"
    file.write_bytes(b"1")
    os.utime(file, (1, 1))
    keys = {identity(str(file), BASE), identity(f"file://{file}", BASE)}
    assert len(keys) == 1
    os.utime(file, (2, 2))
    keys.add(identity(str(file), BASE))
    file.write_bytes(b"22")
    keys.add(identity(str(file), BASE))
    assert len(keys) == 3
    with pytest.raises(FetchError, match="none: cannot be read"):
        identity(str(tmp_path / "none"), BASE)


# ---- other stores ---------------------------------------------------------------------------------------------------


def test_package_that_is_not_there(monkeypatch):
    from fsspec.registry import known_implementations

    monkeypatch.setitem(known_implementations, "oss", {"class": "no_such_store.Files", "err": "Install it"})
    with pytest.raises(
        FetchError, match=r"^oss://b/1.jpg: oss:// needs the package no_such_store; pip install no_such_store$"
    ):
        open_media("oss://b/1.jpg", BASE)
    with pytest.raises(FetchError, match=r"^nowhere://b/1.jpg: fsspec knows no scheme nowhere://; take one"):
        open_media("nowhere://b/1.jpg", BASE)
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(FetchError, match="gs:// needs the package fsspec; pip install fsspec"):
        open_media("gs://b/1.jpg", BASE)


def test_any_store_of_fsspec():
    """A store that is not asynchronous: fsspec's memory."""
    import fsspec

    content = noise(300_000)
    fsspec.filesystem("memory").pipe("/folder/a.bin", content)
    file = open_media("memory://folder/a.bin", BASE)
    file.seek(1000)
    assert file.read(100_000) == content[1000:101_000]
    assert open_media("memory://folder/a.bin", BASE).content().read() == content
    before = identity("memory://folder/a.bin", BASE)
    fsspec.filesystem("memory").pipe("/folder/a.bin", content[1:])
    assert identity("memory://folder/a.bin", BASE) != before
    with pytest.raises(FetchError, match=r"^memory://none: no such file"):
        open_media("memory://none", BASE)
    with pytest.raises(FetchError, match=r"^memory://folder: a folder"):
        open_media("memory://folder", BASE)


def test_store_whose_ranges_include_their_end(monkeypatch):
    """As ossfs 2025.5: `cat_file(start, end)` gives a byte more, except at the end of the file."""
    from fsspec.implementations.memory import MemoryFileSystem

    content = noise(300_000)
    MemoryFileSystem().pipe("/b.bin", content)
    plain = MemoryFileSystem.cat_file
    monkeypatch.setattr(MemoryFileSystem, "cat_file", lambda self, path, start, end: plain(self, path, start, end + 1))
    file = open_media("memory://b.bin", BASE)
    file.seek(70_000)
    assert file.read() == content[70_000:]


# ---- S3 -------------------------------------------------------------------------------------------------------------


@needs_s3
def test_s3_loses_nothing_and_keeps_the_order(server, s3):
    """40 images while 30 % of all requests fail: by 503, by silence beyond the time limit, by a connection cut."""
    contents = [png(i) for i in range(40)]
    for i, content in enumerate(contents):
        s3.put_object(Bucket="media", Key=f"{i}.png", Body=content)
    choose = random.Random(0)
    server.fault = lambda path: choose.choice(["503", "silence", "cut"]) if choose.random() < 0.3 else None
    items = [image(f"s3://media/{i}.png") for i in range(40)]
    settings = FetchSettings(fetch_concurrency=8, fetch_retries=12, fetch_timeout=1)
    got = localise(items, settings)
    assert [item["image"].read() for item in got] == contents
    assert [str(item["image"]) for item in got] == [item["image"] for item in items]
    assert min(server.faults.count(kind) for kind in ("503", "silence", "cut")) >= 3
    assert len(server.faults) > 0.15 * len(server.requests)


@needs_s3
def test_s3_video_through_faults(server, s3, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "BLOCK", 2**12)
    video = encode(tmp_path / "a.mp4", 60, "libx264", 10, options=h264(), size=(192, 128))
    s3.put_object(Bucket="media", Key="a.mp4", Body=video.read_bytes())
    choose = random.Random(1)
    server.fault = lambda path: choose.choice(["503", "cut"]) if choose.random() < 0.3 else None
    [item] = localise(
        [{"type": "video", "video": "s3://media/a.mp4"}], FetchSettings(fetch_retries=12, fetch_timeout=2)
    )
    assert_same_frames(VideoReader(video), VideoReader(item["video"]), [0, 25, 59])
    assert server.faults


@needs_s3
def test_s3_gives_up_with_one_message(server, s3):
    s3.put_object(Bucket="media", Key="1.png", Body=png(1))
    server.fault = lambda path: "503"
    with pytest.raises(FetchError, match=r"^s3://media/1.png: the server answers 503 \(tried 3 times"):
        localise([image("s3://media/1.png")], QUICK)
    assert server.requests == ["HEAD /media/1.png"] * 3  # no library below tried on its own
    server.fault, server.silence = lambda path: "silence", 5
    with pytest.raises(FetchError, match=r"^s3://media/1.png: no answer within 0.5 s \(tried 2 times"):
        localise([image("s3://media/1.png")], FetchSettings(fetch_retries=1, fetch_timeout=0.5))


@needs_s3
def test_s3_what_is_not_there(s3):
    with pytest.raises(FetchError, match=r"^s3://media/none.png: no such file"):
        open_media("s3://media/none.png", QUICK)
    with pytest.raises(FetchError, match=r"^s3://no-bucket/1.png: no such bucket .404 NoSuchBucket.; correct its name"):
        open_media("s3://no-bucket/1.png", QUICK)
    with pytest.raises(FetchError, match=r"^s3://media: a folder; name a file in it"):
        open_media("s3://media", QUICK)


@needs_s3
def test_s3_change_while_reading(s3):
    s3.put_object(Bucket="media", Key="changing", Body=noise(300_000))
    file, key = open_media("s3://media/changing", QUICK), identity("s3://media/changing", QUICK)
    assert identity("s3://media/changing", QUICK) == key
    file.read(10)
    s3.put_object(Bucket="media", Key="changing", Body=noise(300_000, 1))
    assert identity("s3://media/changing", QUICK) != key
    with pytest.raises(FetchError, match=r"^s3://media/changing: changed while it was read; leave the data alone"):
        file.read()


@needs_s3
def test_s3_credentials(moto, server, s3, monkeypatch):
    import boto3

    s3.put_object(Bucket="media", Key="1.png", Body=png(1))
    iam = boto3.client("iam", endpoint_url=f"http://127.0.0.1:{moto}")
    iam.create_user(UserName="reader")
    policy = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}]}
    iam.put_user_policy(UserName="reader", PolicyName="all", PolicyDocument=json.dumps(policy))
    key = iam.create_access_key(UserName="reader")["AccessKey"]

    def check_from_now_on(is_on: bool) -> None:
        body = b"0" if is_on else b"inf"
        address, headers = f"http://127.0.0.1:{moto}/moto-api/reset-auth", {"Content-Type": "text/plain"}
        urllib.request.urlopen(urllib.request.Request(address, body, headers, method="POST")).close()

    access = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    check_from_now_on(True)
    try:
        for name, secret, reason in [
            (key["AccessKeyId"], key["SecretAccessKey"], None),
            ("unknown", SECRET, "403"),
            (key["AccessKeyId"], SECRET, "403"),
            (None, None, "NoCredentialsError"),
        ]:
            forget_connections(monkeypatch)
            for variable, value in (("AWS_ACCESS_KEY_ID", name), ("AWS_SECRET_ACCESS_KEY", secret)):
                monkeypatch.setenv(variable, value) if value else monkeypatch.delenv(variable)
            if reason is None:
                assert localise([image("s3://media/1.png")], QUICK)[0]["image"].read() == png(1)
                continue
            server.requests.clear()
            with pytest.raises(FetchError, match=rf"^s3://media/1.png: access denied \({reason}\); {access}") as caught:
                localise([image("s3://media/1.png")], QUICK)
            assert len(str(caught.value).splitlines()) == 1
            assert SECRET not in "".join(traceback.format_exception(caught.value))
            assert len(server.requests) <= 1
    finally:
        check_from_now_on(False)


# ---- data workers ---------------------------------------------------------------------------------------------------


class Files(Dataset):
    def __init__(self, paths: list[str], settings: FetchSettings) -> None:
        self.paths, self.settings = paths, settings

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> bytes:
        return localise([image(self.paths[index])] * 2, self.settings)[1]["image"].read()


@needs_http
@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_data_workers(server, start):
    contents = [png(i) for i in range(12)]
    files = Files([server.add(f"{i}.png", content) for i, content in enumerate(contents)], QUICK)
    half_read = open_media(server.add("noise", noise(300_000)), QUICK)
    half_read.read(10)
    workers = 2 if start == "fork" else 1
    loader = DataLoader(files, batch_size=None, num_workers=workers, multiprocessing_context=start, timeout=30)
    for _ in range(workers):  # the parent before, between and after the workers, over connections that it keeps
        assert [files[i] for i in range(3)] == contents[:3]
        assert list(loader) == contents
    server.requests.clear()
    assert [files[i] for i in range(12)] == contents
    assert half_read.read() == noise(300_000)[10:]
    assert len(server.requests) == 12 * 4 + 1  # no connection of the parent was taken by another process
    if start == "fork":
        files.paths[5] += "x"
        batches = iter(loader)
        with pytest.raises(FetchError, match=r"/5.pngx: no such file"):
            list(batches)
        batches._shutdown_workers()  # before the server ends, for which they would wait


@needs_s3
def test_s3_in_data_workers(s3):
    contents = [png(i) for i in range(6)]
    for i, content in enumerate(contents):
        s3.put_object(Bucket="media", Key=f"{i}.png", Body=content)
    files = Files([f"s3://media/{i}.png" for i in range(6)], QUICK)
    loader = DataLoader(files, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=15)
    assert files[0] == contents[0]
    assert list(loader) == contents
    assert files[1] == contents[1]


# ---- videos ---------------------------------------------------------------------------------------------------------

INDEX = ("_pts", "_packet_times", "_key_packets", "_packet_number", "_time_base", "_skip", "_can_seek",
         "duration", "average_fps", "height", "width", "warnings")  # fmt: skip


def assert_same_frames(local: VideoReader, remote: VideoReader, indices: list[int]) -> None:
    for name in INDEX:
        assert getattr(remote, name) == getattr(local, name), name
    for here, there in zip(local.frames_at(indices), remote.frames_at(indices), strict=True):
        assert torch.equal(here, there)


VPX = {"deadline": "realtime", "cpu-used": "8"}
CHOSEN = ("gop_30.mp4", "open.mp4", "gradual_refresh.mp4", "fragments.mp4", "edit_list.mp4", "variable_rate.mp4",
          "audio.mp4", "hevc.mp4", "hevc_open.mp4", "hevc_layers.mp4", "mpeg4.mp4", "av1.mp4")  # fmt: skip
VIDEOS = {name: FILES[name] for name in CHOSEN} | {
    "faststart.mp4": ("libx264", 15, {"options": h264("bframes=3"), "container_options": {"movflags": "faststart"}}),
    "fragments_audio.mp4": ("libx264", 15, {"options": h264("bframes=3"), "audio": True,
                            "container_options": {"movflags": "frag_keyframe+empty_moov+default_base_moof"}}),
    "fragments_index.mp4": ("libx265", 15, {"container_options": {"movflags": "dash+frag_keyframe+empty_moov+global_sidx"}}),
    "hevc_audio.mov": ("libx265", 15, {"audio": True}),
    "vp9.mp4": ("libvpx-vp9", 15, {"options": VPX}),
    "vp9_hidden.mp4": ("libvpx-vp9", 30, {"options": {"cpu-used": "5", "auto-alt-ref": "1", "lag-in-frames": "16"}}),
    "vp9_fragments.mp4": ("libvpx-vp9", 15, {"options": VPX, "container_options": {"movflags": "frag_keyframe"}}),
    "mjpeg.mov": ("mjpeg", 1, {"pixels": "yuvj420p"}),
}  # fmt: skip
NOT_SKIMMED = {"mjpeg.mov"}


@needs_http
@pytest.mark.parametrize("name", VIDEOS)
def test_index_over_zeros_is_the_index(server, tmp_path, monkeypatch, name):
    """Nothing but the index and what is decoded is fetched, as blocks are small; each fact and frame is as in the file."""
    if name not in NOT_SKIMMED:
        monkeypatch.setattr(fetch, "BLOCK", 512)
        monkeypatch.setattr(fetch, "MOST_READ_AHEAD", 512)
        monkeypatch.setattr(fetch, "SMALLEST_GAP", 0)
    codec, gop, settings = VIDEOS[name]
    count = 170 if "fragments" in name else 100  # FFmpeg reads up to 5 seconds of fragments when it opens them
    video = encode(tmp_path / name, count, codec, gop, size=(256, 160), **settings)
    local = VideoReader(video)
    remote = VideoReader(open_media(server.add(name, video.read_bytes()), QUICK))
    assert bool(remote._packet_bytes) == (name not in NOT_SKIMMED)
    assert server.sent < 0.9 * video.stat().st_size or name in NOT_SKIMMED
    assert_same_frames(local, remote, [0, 1, 44, 59, 60, len(local) - 1])
    assert_same_frames(local, remote, list(range(0, len(local), 3)))
    assert server.sent <= video.stat().st_size


@needs_http
@pytest.mark.parametrize("name", ["gop_250.mkv", "vp9_hidden.webm", "open.ts", "b_frames.avi", "animation.gif"])
def test_other_formats(server, tmp_path, name):
    codec, gop, settings = FILES[name]
    video = encode(tmp_path / name, 60, codec, gop, **settings)
    remote = VideoReader(open_media(server.add(name, video.read_bytes()), QUICK))
    assert_same_frames(VideoReader(video), remote, [0, 29, 59])
    iterators = [remote.frames_at(range(30)), remote.frames_at(range(30))]  # side by side, over one file object
    for one, other in zip(*iterators, strict=True):
        assert torch.equal(one, other)
    assert server.sent == video.stat().st_size


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """25 MB of H.264 that is mostly noise, with sound, its index at the end."""
    path, random_pixels = tmp_path_factory.mktemp("video") / "large.mp4", np.random.default_rng(0)
    pictures = random_pixels.integers(0, 256, (8, 360, 640, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        options = {"preset": "ultrafast", "x264-params": "log-level=none:threads=1:keyint=15"}
        stream = container.add_stream("libx264", rate=30, options=options)
        stream.width, stream.height, stream.pix_fmt = 640, 360, "yuv420p"
        sound = container.add_stream("aac", rate=48000, layout="mono")
        for i in range(210):
            picture = av.VideoFrame.from_ndarray(np.roll(pictures[i % 8], i, axis=1), format="rgb24")
            container.mux(stream.encode(picture))
            wave = random_pixels.normal(0, 0.1, (1, 1600)).astype(np.float32)
            samples = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
            samples.rate, samples.pts = 48000, 1600 * i
            container.mux(sound.encode(samples))
        container.mux(stream.encode())
        container.mux(sound.encode())
    assert path.stat().st_size >= 20_000_000
    return path


@needs_http
@pytest.mark.parametrize("is_faststart", [False, True], ids=["index at the end", "index at the front"])
def test_few_frames_take_few_bytes(server, large, tmp_path, is_faststart):
    if is_faststart:
        source, large = large, tmp_path / "faststart.mp4"
        with av.open(str(source)) as reading, av.open(str(large), "w", options={"movflags": "faststart"}) as writing:
            copies = [writing.add_stream_from_template(stream) for stream in reading.streams]
            for packet in reading.demux():
                if packet.size:
                    packet.stream = copies[packet.stream_index]
                    writing.mux(packet)
    path = server.add("large.mp4", large.read_bytes())
    remote = VideoReader(localise([{"type": "video", "video": path}], QUICK)[0]["video"])
    assert len(remote) == 210
    share_of_index = server.sent / large.stat().st_size
    indices = torch.linspace(0, 209, 4).round().long().tolist()
    assert_same_frames(VideoReader(large), remote, indices)
    share = server.sent / large.stat().st_size
    print(f"{large.stat().st_size:,} bytes; index {share_of_index:.1%}, with 4 frames {share:.1%}, "
          f"{len(server.requests)} requests")  # fmt: skip
    assert share_of_index < 0.06
    assert share < 0.4
    assert len(server.requests) < 20


@needs_http
def test_many_small_fragments_are_read_in_full(server, tmp_path):
    options = {"movflags": "frag_keyframe+empty_moov"}
    video = encode(tmp_path / "a.mp4", 200, "libx264", 5, options=h264(), size=(320, 240), container_options=options)
    remote = VideoReader(open_media(server.add("a.mp4", video.read_bytes()), QUICK))
    assert not remote._packet_bytes
    assert len(server.requests) < 12
    assert_same_frames(VideoReader(video), remote, [0, 99, 199])


@needs_http
def test_key_frames_that_the_index_only_claims(server, tmp_path, monkeypatch):
    """Without its table of key frames (`stss`) an MP4 claims that all are; their own bytes tell that they are not."""
    monkeypatch.setattr(fetch, "BLOCK", 512)
    monkeypatch.setattr(fetch, "MOST_READ_AHEAD", 512)
    monkeypatch.setattr(fetch, "SMALLEST_GAP", 0)
    video = encode(tmp_path / "a.mp4", 90, "libx264", 30, options=h264("bframes=3:scenecut=0"))
    video.write_bytes(video.read_bytes().replace(b"stss", b"free"))
    local = VideoReader(video)
    remote = VideoReader(open_media(server.add("a.mp4", video.read_bytes()), QUICK))
    assert remote._packet_bytes
    assert len(remote._key_packets) == 90
    for indices in ([0, 44, 89], [20], list(range(0, 90, 7))):
        for here, there in zip(local.frames_at(indices), remote.frames_at(indices), strict=True):
            assert torch.equal(here, there)


@needs_http
@pytest.mark.parametrize("name", ["audio.mp4", "gop_250.mkv", "open.ts"])
def test_a_fetch_that_fails_is_no_short_video(server, tmp_path, monkeypatch, capfd, name):
    """FFmpeg takes a failed read for the end of the file: the index must not, nor a frame."""
    monkeypatch.setattr(fetch, "BLOCK", 1024)
    monkeypatch.setattr(fetch, "MOST_READ_AHEAD", 1024)
    codec, gop, settings = FILES[name]
    video = encode(tmp_path / name, 100, codec, gop, **settings)
    path = server.add(name, video.read_bytes())
    settings = FetchSettings(fetch_retries=1, fetch_timeout=5)
    needed = 0  # requests of a run that goes well
    for fails_after in [None, *range(1, 300, 9)]:
        server.requests.clear()
        fail = fails_after is not None
        server.fault = lambda path: "503" if fail and len(server.requests) > fails_after else None  # noqa: B023
        if not fail:
            list(VideoReader(open_media(path, settings)).frames_at([0, 50, 99]))
            needed = len(server.requests)
        elif fails_after < needed:
            with pytest.raises(FetchError, match=rf"/{name}: the server answers 503 \(tried 2 times"):
                list(VideoReader(open_media(path, settings)).frames_at([0, 50, 99]))
    assert needed > 10
    assert capfd.readouterr().err == ""


@needs_http
def test_not_a_video(server):
    for content in (b"", b"hello", png(0)[:50]):
        with pytest.raises(VideoError, match=r"^http://127.*/a.mp4: "):
            VideoReader(open_media(server.add("a.mp4", content), QUICK))


@needs_http
def test_truncated_video(server, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "SMALLEST_GAP", 0)
    monkeypatch.setattr(fetch, "BLOCK", 1024)
    whole = encode(tmp_path / "a.mp4", 90, "libx264", 30, options=h264(), container_options={"movflags": "faststart"})
    video = tmp_path / "cut.mp4"
    for share in (0.4, 0.6, 0.9):
        video.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * share)])
        local = VideoReader(video)
        remote = VideoReader(open_media(server.add("cut.mp4", video.read_bytes()), QUICK))
        assert len(local) == len(remote)
        assert [text.partition(": ")[2] for text in local.warnings] == [
            text.partition(": ")[2].partition(": ")[2] or text.partition(": ")[2] for text in remote.warnings
        ]


# ---- boxes in remote images -----------------------------------------------------------------------------------------


@needs_http
def test_boxes_in_remote_images(server, tmp_path, processor):
    """The size that a box needs is read from the first bytes, and asked for once by a process."""
    from util.cost.measure import look
    from util.data.media import MediaReader
    from util.dataset import DataError, Examples, Samples
    from util.vision import Budget

    noise = np.random.default_rng(0).integers(0, 256, (600, 1200, 3), dtype=np.uint8)
    written = io.BytesIO()
    Image.fromarray(noise).save(written, "PNG")
    server.files["/wide.png"] = written.getvalue()

    def asking(*bbox, path="wide.png") -> dict:
        question = {"role": "user", "content": [{"type": "image", "image": server.url(path)}]}
        return {"messages": [question, {"role": "assistant", "content": [{"type": "box", "bbox": bbox}]}]}

    (tmp_path / "data.json").write_text(
        json.dumps([asking(0, 0, 600, 300), asking(0, 0, 1201, 300), asking(0, 0, 1, 1, path="gone.png")])
    )
    reader = MediaReader(QUICK)
    samples = Samples(Examples([str(tmp_path / "data.json")], processor), processor, Budget(max_pixels=3136), reader)
    for _ in range(3):
        (answer,) = samples.example(0).messages[1]["content"]
        assert answer == {"type": "text", "text": "<|box_start|>(0,0),(500,500)<|box_end|>"}
    assert server.sent <= fetch.FIRST_BYTES < len(server.files["/wide.png"]) / 4
    assert 1 <= len(server.requests) <= 3, "the other times it was known"
    assert list(reader.sizes.values()) == [(1200, 600)]
    good, outside, gone = look(samples, 1000, "stop")
    assert good.size == samples.size(0)
    assert "which is 1200 pixels wide and 600 high" in outside.problem
    assert outside.reason == "bad conversation"
    assert gone.reason == "not fetched"
    assert len(samples[0].encoded.input_ids) == good.size.tokens - samples[0].media[0].grid.tokens + 1
    with pytest.raises(DataError, match="sample 2: "):
        samples[2]
