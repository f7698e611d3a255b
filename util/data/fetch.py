"""Media from anywhere: local paths, `file://`, `data:`, `http(s)://`, and every store that fsspec has a package for.

`s3://` needs the package s3fs, `gs://` gcsfs, `oss://` ossfs, `http(s)://` aiohttp, which find credentials in their own
places. A remote file is read by ranges; a request that fails is repeated where another try may help, after ever longer
waits. What was read is kept in an unnamed temporary file until the file object is gone, so that no byte is transferred
twice. For a store whose package is not asynchronous (ossfs) the time limits are those of that package.
"""

import base64
import errno
import hashlib
import io
import os
import random
import re
import tempfile
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import BinaryIO
from urllib.parse import unquote, unquote_to_bytes

from util.command_line import UserError
from util.data.settings import FetchSettings

BLOCK = 2**16  # bytes: a file is cached and asked for in whole blocks
FIRST_BYTES = 2**18  # bytes of a video that are fetched as it is opened
MOST_READ_AHEAD = 2**22  # bytes that a request asks for at most where a file is read from one end to the other
LONGEST_REQUEST = 2**23  # bytes; a longer stretch is several requests, so that a time-out costs only one of them
SMALLEST_GAP = 2**20  # bytes; less media data than this is read, as leaving it out would take longer
FIRST_WAIT = 0.5  # seconds, the upper bound of the wait before the second try; it doubles with each further one
LONGEST_WAIT = 20.0  # seconds, the upper bound of any wait
LONGEST_NAME = 80  # characters of a `data:` URI that a message shows

# Headers and fields of fsspec's `info` that change when a file does, the most telling first.
VERSION_FIELDS = ("ETag", "etag", "Content-MD5", "Digest", "md5Hash", "content_md5", "generation",
                  "LastModified", "Last-Modified", "last_modified", "updated", "mtime", "created")  # fmt: skip
CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE (and AWS_ENDPOINT_URL where the store is "
    "not Amazon's), or FSSPEC_S3_ANON=true for a public bucket",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS, or FSSPEC_GS_TOKEN=anon for a public bucket",
    "oss": "set FSSPEC_OSS_KEY, FSSPEC_OSS_SECRET and OSS_ENDPOINT",
    "az": "set AZURE_STORAGE_CONNECTION_STRING",
    "http": "the address may have expired or need a sign-in",
}
CREDENTIALS |= {"s3a": CREDENTIALS["s3"], "gcs": CREDENTIALS["gs"], "https": CREDENTIALS["http"]}
# Exceptions of botocore and google-auth by name, so that neither need be installed.
CREDENTIAL_ERRORS = {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound",
                     "TokenRetrievalError", "UnauthorizedSSOTokenError", "SSOTokenLoadError", "RefreshError",
                     "DefaultCredentialsError"}  # fmt: skip
# Errors that another try may overcome. HTTP status 501 is not among them: that server does not know the request.
PASSING_STATUSES = {408, 425, 429, 500, *range(502, 600)}
PASSING_CODES = {"RequestTimeout", "SlowDown", "InternalError", "ServiceUnavailable", "Throttling"}  # S3's

CONNECTING = threading.Lock()  # so that threads that start together make one file system and not one each


class FetchError(UserError):
    """A file that cannot be fetched; the message says which, why and what to do, and holds no secret."""


class NoRangesError(Exception):
    """The server sends whole files only."""


class ChangedError(Exception):
    """The file is no longer the one that was opened."""


# ---- paths ----------------------------------------------------------------------------------------------------------


def scheme_of(path: str) -> str:
    """The scheme of a path in lower case, such as `s3` or `data`; empty for a local path."""
    found = re.match(r"(data)(?=:)|([a-z][a-z0-9+.-]*)(?=://)", path, re.IGNORECASE)
    return found[0].lower() if found else ""


def is_remote(path: str) -> bool:
    """Whether a path has a scheme other than `file://`: `data:`, `https://`, `s3://` ..."""
    return scheme_of(path) not in ("", "file")


def local_path(path: str) -> str:
    """The path that `file://` stands for, percent-decoded unless only the path as it is written exists."""
    if scheme_of(path) != "file":
        return path
    plain = re.sub("^localhost(?=/)", "", path[len("file://") :])
    decoded = unquote(plain)
    only_plain_exists = os.path.exists(plain) and not os.path.exists(decoded)
    return plain if only_plain_exists else decoded


def printable(path: str) -> str:
    """A path as messages show it: without user, password and query, which may be secrets; `data:` shortened."""
    scheme = scheme_of(path)
    if scheme == "data":
        return path if len(path) <= LONGEST_NAME else f"{path[: LONGEST_NAME - 3]}..."
    path = re.sub(r"(?<=://)[^/?#]*@", "", path)
    if scheme in ("http", "https"):
        path = re.sub(r"[?#].*", "?...", path, flags=re.DOTALL)
    return path


# ---- what the readers of media call ---------------------------------------------------------------------------------


def open_media(path: str, settings: FetchSettings) -> str | BinaryIO:
    """A local path for a local file, else a seekable file object to read; str() of it is the path.

    `data:` is decoded into memory. For a remote file the server is asked for the size, and then for ranges as they are
    needed; where it does not send ranges, the file is downloaded. Raises FetchError, now or while reading.
    """
    scheme = scheme_of(path)
    if scheme in ("", "file"):
        return local_path(path)
    if scheme == "data":
        return decode_data(path)
    return RangeFile(Blocks(Source(path, settings)))


def identity(path: str, settings: FetchSettings) -> str:
    """A text that changes with the path and when the file changes: a key for what was computed from the file.

    It is made of size and modification time of a local file, of size and ETag (else modification time) of a remote one,
    and of the size alone where a server tells nothing else. Raises FetchError.
    """
    scheme = scheme_of(path)
    if scheme in ("", "file"):
        try:
            status = os.stat(local_path(path))
        except OSError as error:
            raise FetchError(f"{path}: cannot be read ({error.strerror})") from None
        version = (os.path.abspath(local_path(path)), status.st_size, status.st_mtime_ns)
    elif scheme == "data":
        version = (path,)
    else:
        source = Source(path, settings)
        version = (path, source.size, next(iter(source.version.items()), None))
    return hashlib.sha256(repr(version).encode("utf-8", "surrogatepass")).hexdigest()


def localise(items: list[dict], settings: FetchSettings, whole_images: bool = True) -> list[dict]:
    """Image and video items in their order, each remote path replaced by an open file object.

    Images are fetched whole, unless `whole_images` is False: then, as videos, they are read by ranges when needed,
    which is enough for their size. At most `fetch_concurrency` files are fetched at a time, in threads; local paths
    stay as they are and start none. Raises the FetchError of the first item, in order, that cannot be fetched.
    """
    paths = []  # of all items, in order
    whole = []  # whether each is to be fetched whole
    for item in items:
        value = item[item["type"]]
        is_image = item["type"] == "image" or isinstance(value, list)
        for path in value if isinstance(value, list) else [value]:
            if scheme_of(path):
                paths.append(path)
                whole.append(is_image and whole_images)
    remote = sum(is_remote(path) and scheme_of(path) != "data" for path in paths)
    fetch = partial(fetch_media, settings=settings)
    if remote > 1 and settings.fetch_concurrency > 1:
        with ThreadPoolExecutor(min(remote, settings.fetch_concurrency), "fetch") as pool:
            files = iter(list(pool.map(fetch, paths, whole)))
    else:
        files = iter(list(map(fetch, paths, whole)))

    localised = []
    for item in items:
        value = item[item["type"]]
        if isinstance(value, list):
            value = [next(files) if scheme_of(path) else path for path in value]
        elif scheme_of(value):
            value = next(files)
        localised.append({**item, item["type"]: value})
    return localised


def fetch_media(path: str, whole: bool, settings: FetchSettings) -> str | BinaryIO:
    """What `open_media` gives, the whole file or its first bytes already here. Raises FetchError."""
    file = open_media(path, settings)
    if isinstance(file, RangeFile):
        if whole:
            return file.content()
        file.prefetch(0, FIRST_BYTES)  # every reader begins there, and threads wait for it side by side
    return file


def decode_data(path: str) -> "Content":
    """The bytes of a `data:` URI (RFC 2397). Raises FetchError."""
    head, comma, body = path.partition(",")
    if not comma:
        raise FetchError(f"{printable(path)}: no comma in it; a data URI is data:image/png;base64,AAAA...")
    body = unquote_to_bytes(body)
    if head.lower().endswith(";base64"):
        try:
            body = base64.b64decode(b"".join(body.split()), validate=True)
        except ValueError as error:
            raise FetchError(f"{printable(path)}: broken base64 ({error}); encode the file anew") from None
    return Content(body, printable(path))


# ---- file objects ---------------------------------------------------------------------------------------------------


class Content(io.BytesIO):
    """A file in memory that knows its path. It has the methods of RangeFile, and nothing is left to be fetched."""

    failure = None

    def __init__(self, content: bytes, name: str) -> None:
        super().__init__(content)
        self.name = name
        self._content = content

    def __repr__(self) -> str:  # PIL names a file that is no image by this
        return self.name

    __str__ = __repr__

    def reopen(self) -> "Content":
        return Content(self._content, self.name)

    def prefetch(self, start: int, end: int) -> None:
        pass

    def skim_media_data(self) -> bool:
        return False

    def is_here(self) -> bool:
        return True


class RangeFile(io.RawIOBase):
    """A remote file, read by ranges as they are needed. Several RangeFiles of one file share its blocks.

    Only one thread at a time may read. A read raises FetchError where a fetch failed for good. The error is kept in
    `failure`, because FFmpeg takes a failed read for the end of the file.
    """

    def __init__(self, blocks: "Blocks") -> None:
        self._blocks = blocks
        self._position = 0
        self._zeros: list[tuple[int, int]] = []  # stretches (start, end) that read as zeros where they are not here
        self.name = printable(blocks.source.path)

    def __repr__(self) -> str:
        return self.name

    __str__ = __repr__

    @property
    def failure(self) -> FetchError | None:
        return self._blocks.failure

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        bases = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._blocks.source.size}
        base = bases[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer) -> int:
        start = self._position
        end = max(start, min(start + len(buffer), self._blocks.source.size))
        view = memoryview(buffer)
        for piece in self._blocks.read(start, end, self._zeros):
            view[self._position - start :][: len(piece)] = piece
            self._position += len(piece)
        return end - start

    def content(self) -> Content:
        """The whole file in memory."""
        try:
            return Content(self._blocks.source.whole(), self.name)
        except FetchError as error:
            self._blocks.failure = error
            raise

    def reopen(self) -> "RangeFile":
        """Another cursor at the start of the same file, over the same cache."""
        return RangeFile(self._blocks)

    def is_here(self) -> bool:
        """Whether all of the file is here, so that reading it sends no request."""
        return self._blocks.is_complete()

    def prefetch(self, start: int, end: int) -> None:
        """Fetch these bytes now, in as few requests as can be."""
        self._blocks.ahead = 1  # the caller knows what it will read
        self._blocks.fetch(start // BLOCK, -(-end // BLOCK))

    def skim_media_data(self) -> bool:
        """From now on read the media data of an MP4 file that is not here yet as zeros, without fetching it.

        This is for a demuxer that is asked for packets' times and not for what is in them: it takes the times from the
        index (`moov`, `moof`). The media data lies in top-level `mdat` boxes (ISO/IEC 14496-12, 4.2 and 8.1.1). False,
        and nothing changes, where a box of media data is so small that leaving it out takes longer than reading it.
        """
        size = self._blocks.source.size
        found = []
        start = 0  # of a box
        while start + 8 <= size:
            head = b"".join(self._blocks.read(start, min(start + 16, size), []))
            length = int.from_bytes(head[:4])
            header = 8  # bytes
            if length == 1:  # the length follows in 64 bits
                length = int.from_bytes(head[8:16])
                header = 16
            elif length == 0:  # to the end of the file
                length = size - start
            if length < header:
                break
            if head[4:8] == b"mdat":
                if length < SMALLEST_GAP and start + length < size:
                    return False
                found.append((start + header, min(start + length, size)))
            start += length
        self._zeros = found
        return bool(found)


class Blocks:
    """What is here of a remote file, block by block in a temporary file on disk."""

    def __init__(self, source: "Source") -> None:
        self.source = source
        self.failure: FetchError | None = None
        self._count = -(-source.size // BLOCK)
        self._file = source.held or tempfile.TemporaryFile(prefix="fetch-")
        self._here = set(range(self._count)) if source.held else set()  # numbers of blocks
        self._next = 0  # the block after those fetched last
        self.ahead = 1  # how many blocks the last fetch took

    def read(self, start: int, end: int, zeros: list[tuple[int, int]]) -> Iterator[bytes]:
        """The bytes from `start` to `end` in pieces. Raises FetchError.

        `zeros`: sorted stretches (start, end) that are given as zeros where they are not here.
        """
        while start < end:
            number = start // BLOCK
            stop = min(end, (number + 1) * BLOCK)
            if number not in self._here:
                place = bisect_right(zeros, start, key=lambda gap: gap[0])
                if place and start < zeros[place - 1][1]:
                    stop = min(stop, zeros[place - 1][1])
                    yield bytes(stop - start)
                    start = stop
                    continue
                # A reader that goes on where the last fetch ended gets twice as much, so that a whole file takes few
                # requests.
                if number == self._next:
                    self.ahead = min(2 * self.ahead, MOST_READ_AHEAD // BLOCK)
                else:
                    self.ahead = 1
                self.fetch(number, number + self.ahead)
            yield os.pread(self._file.fileno(), stop - start, start)
            start = stop

    def is_complete(self) -> bool:
        return len(self._here) == self._count

    def fetch(self, first: int, end: int) -> None:
        """Fetch the blocks from `first` up to `end`. Raises FetchError, and after a failure always the same one."""
        if self.failure:
            raise self.failure
        try:
            self._fetch(first, min(end, self._count))
        except FetchError as error:
            self.failure = error
            raise

    def _fetch(self, first: int, end: int) -> None:
        while first < end:
            stop = first
            while stop < end and stop not in self._here and stop - first < LONGEST_REQUEST // BLOCK:
                stop += 1
            if stop > first:
                start = first * BLOCK
                try:
                    content = self.source.range(start, min(stop * BLOCK, self.source.size))
                except NoRangesError:
                    self.source.download(self._file)
                    self._here.update(range(self._count))
                    return
                # pwrite, as the position of the file itself is shared with processes that were forked.
                if os.pwrite(self._file.fileno(), content, start) < len(content):
                    raise OSError(errno.ENOSPC, f"no space for {self.source}; name another folder in TMPDIR")
                self._here.update(range(first, stop))
                self._next = stop
            first = max(stop, first + 1)


# ---- requests -------------------------------------------------------------------------------------------------------


class Source:
    """A remote file: its size in bytes, its version, and requests for its bytes, repeated where that may help.

    `held`: the whole file, where its size could not be known without it; else None.
    """

    def __init__(self, path: str, settings: FetchSettings) -> None:
        self.path, self.settings = path, settings
        self.is_http = scheme_of(path) in ("http", "https")
        info = self._persist(self._info)
        if info.get("type") == "directory":
            raise FetchError(f"{self}: a folder; name a file in it")
        self.version = {name: str(info[name]) for name in VERSION_FIELDS if info.get(name)}
        self.sends_ranges = info.get("partial", True)
        self.size = info.get("size") or 0
        self.held: BinaryIO | None = None
        if not self.size:  # 0, too: some servers answer so, as they do not make the content for a HEAD request
            self.held = tempfile.TemporaryFile(prefix="fetch-")
            self._persist(lambda: self._whole(self.held))
            self.size = self.held.tell()

    def __str__(self) -> str:
        return printable(self.path)

    def range(self, start: int, end: int) -> bytes:
        """The bytes from `start` to `end`. Raises FetchError; NoRangesError where `download` must be used."""
        if self.held or not self.sends_ranges:
            raise NoRangesError
        return self._persist(lambda: self._range(start, end))

    def whole(self) -> bytes:
        """All bytes. Raises FetchError."""
        try:
            stretches = range(0, self.size, LONGEST_REQUEST)
            return b"".join([self.range(start, min(start + LONGEST_REQUEST, self.size)) for start in stretches])
        except NoRangesError:
            file = self.held or tempfile.TemporaryFile(prefix="fetch-")
            if not self.held:
                self.download(file)
            file.seek(0)
            return file.read()

    def download(self, file: BinaryIO) -> None:
        """Write all bytes to a file. Raises FetchError."""
        self._persist(lambda: self._whole(file))
        if file.tell() != self.size:
            raise self._changed()

    # Each of these makes one try and may raise any exception.

    def _info(self) -> dict:
        store = self._store()
        if store.async_impl:
            return self._wait_for(store._info, store._strip_protocol(self.path))
        return store.info(store._strip_protocol(self.path))

    def _range(self, start: int, end: int) -> bytes:
        store = self._store()
        if self.is_http:
            content = self._wait_for(self._http_range, store, start, end)
        elif hasattr(store, "_call_s3"):
            content = self._wait_for(self._s3_range, store, start, end)
        elif store.async_impl:
            content = self._wait_for(store._cat_file, store._strip_protocol(self.path), start=start, end=end)
        else:
            content = store.cat_file(store._strip_protocol(self.path), start=start, end=end)
        if len(content) == end - start + 1 and not self.is_http:  # ossfs 2025.5: its ranges include their end
            content = content[:-1]
        if len(content) != end - start:
            raise EOFError(f"{len(content)} of {end - start} bytes")
        return content

    def _whole(self, file: BinaryIO) -> None:
        store = self._store()
        file.seek(0)
        file.truncate()
        if self.is_http:
            from fsspec.asyn import sync

            sync(store.loop, self._http_whole, store, file)
        else:
            file.write(store.cat_file(store._strip_protocol(self.path)))
        file.flush()

    # fsspec gives no headers with the content. These requests look at them, to see that the content belongs to the
    # version that was opened.

    def _http_request(self, session, store, **headers: str):
        """A GET request in fsspec's session for the content as it is stored, as ranges of a compressed one differ."""
        headers = {**store.kwargs.get("headers", {}), "Accept-Encoding": "identity", **headers}
        return session.get(store.encode_url(self.path), **{**store.kwargs, "headers": headers})

    async def _http_range(self, store, start: int, end: int) -> bytes:
        session = await store.set_session()
        async with self._http_request(session, store, Range=f"bytes={start}-{end - 1}") as answer:
            answer.raise_for_status()
            self._check(answer.headers, answer.headers.get("Content-Range", ""))
            if answer.status != 206 and (start, end) != (0, self.size):
                raise NoRangesError
            return await answer.read()

    async def _http_whole(self, store, file: BinaryIO) -> None:
        import asyncio

        loop = asyncio.get_running_loop()
        session = await store.set_session()
        async with asyncio.timeout(self.settings.fetch_timeout) as limit, self._http_request(session, store) as answer:
            answer.raise_for_status()
            self._check(answer.headers, "")
            while piece := await answer.content.read(LONGEST_REQUEST):
                file.write(piece)
                limit.reschedule(loop.time() + self.settings.fetch_timeout)

    async def _s3_range(self, store, start: int, end: int) -> bytes:
        bucket, key, version = store.split_path(store._strip_protocol(self.path))
        names = {"Bucket": bucket, "Key": key}
        if version:
            names["VersionId"] = version
        answer = await store._call_s3("get_object", **names, Range=f"bytes={start}-{end - 1}")
        async with answer["Body"] as body:
            self._check(answer, answer.get("ContentRange", ""))
            return await body.read()

    def _check(self, told: dict, content_range: str) -> None:
        """ChangedError where an answer's size or version differs from that at opening.

        For a store its first version field decides, the ETag. Behind an http address there may be several servers, each
        with an ETag of its own for the same file: there the file has changed only if every version field differs.
        """
        size = content_range.rpartition("/")[2]
        if size.isdigit() and int(size) != self.size:
            raise ChangedError
        is_same = [then == str(told[name]) for name, then in self.version.items() if told.get(name)]
        if not self.is_http:
            is_same = is_same[:1]
        if is_same and not any(is_same):
            raise ChangedError

    def _changed(self) -> FetchError:
        return FetchError(f"{self}: changed while it was read; leave the data alone during a run and start again")

    # Time limits and further tries.

    def _store(self):
        """fsspec's file system for this path in this process."""
        with CONNECTING:
            settings = self.settings
            return connect(scheme_of(self.path), settings.fetch_timeout, settings.fetch_concurrency, os.getpid())

    def _wait_for(self, function: Callable, *arguments, **options):
        """The result of a coroutine function, run on fsspec's event loop for at most `fetch_timeout` seconds."""
        from fsspec.asyn import sync

        return sync(self._store().loop, function, *arguments, timeout=self.settings.fetch_timeout, **options)

    def _persist(self, request: Callable):
        """The result of `request`, tried `fetch_retries` times more while it fails in a way that may pass.

        Between tries it waits a random time below a bound that doubles ("full jitter": AWS Architecture Blog,
        "Exponential Backoff And Jitter"), so that workers that failed together do not come back together.
        """
        begin = time.monotonic()
        tries = self.settings.fetch_retries + 1
        for number in range(tries):
            if number:
                longest = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (number - 1))
                # Not from the global generator: what training draws from it must not depend on the network.
                time.sleep(random.SystemRandom().uniform(0, longest))
            try:
                return request()
            except (FetchError, NoRangesError):
                raise
            except ChangedError:
                raise self._changed() from None
            except Exception as error:
                # The libraries' messages may hold signed addresses and keys, so none of them is passed on.
                problem, fix = judge(error, self.path, self.settings.fetch_timeout)
                if fix:
                    raise FetchError(f"{self}: {problem}; {fix}") from None
        count = f"tried {tries} times in {time.monotonic() - begin:.0f} s" if tries > 1 else "tried once"
        raise FetchError(
            f"{self}: {problem} ({count}); see that the server is well and can be reached, "
            "or raise --fetch_retries or --fetch_timeout"
        )


@cache
def connect(scheme: str, timeout: float, concurrency: int, process: int):
    """fsspec's file system for a scheme, made once in each process; ImportError where its package is missing.

    fsspec's event loop is a thread, which a forked process lacks, so each worker needs a file system of its own. The
    cache never drops one: fsspec would close it wherever the garbage collector happens to run, which can block its own
    event loop, and in a worker would close the parent's connections, as both processes share the object that polls
    them.
    """
    import fsspec
    from fsspec.config import conf

    options = {}
    if scheme in ("http", "https"):
        import aiohttp

        # Time limits are per request, above. With trust_env the proxies of the environment are used, as everywhere.
        options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(total=None), "trust_env": True}
    elif scheme in ("s3", "s3a"):
        options["config_kwargs"] = {"connect_timeout": timeout, "read_timeout": timeout, "retries": {"max_attempts": 0},
                                    "max_pool_connections": max(10, concurrency)}  # fmt: skip
    for name, ours in options.items():  # the user's configuration of fsspec takes precedence
        options[name] = {**ours, **conf.get(scheme, {}).get(name, {})}
    # fsspec's own cache would hold one per thread.
    store = fsspec.filesystem(scheme, skip_instance_cache=True, **options)
    if hasattr(store, "_call_s3"):
        store.retries = 1  # because Source._persist counts the tries
    return store


def judge(error: Exception, path: str, timeout: float) -> tuple[str, str | None]:
    """What a failed request means, as (problem, fix); the fix is None where another try may help."""
    chain = chain_of(error)
    root = chain[-1]
    names = {type(link).__name__ for link in chain}
    scheme = scheme_of(path)
    status, code = status_of(chain)
    label = f"{status or ''} {code}".strip() or type(root).__name__.replace("FileNotFoundError", "404")
    access = CREDENTIALS.get(scheme, f"see the documentation of fsspec on {scheme}://")
    if isinstance(error, ImportError):
        package = (getattr(root, "name", None) or "fsspec").partition(".")[0]
        return f"{scheme}:// needs the package {package}", f"pip install {package}"
    if "Protocol not known" in str(error):
        return f"fsspec knows no scheme {scheme}://", "take one that it lists, such as s3, gs, oss, az, hf or https"
    if code in PASSING_CODES or status in PASSING_STATUSES:
        return f"the server answers {label}", None
    if code == "NoSuchBucket":
        return f"no such bucket ({label})", "correct its name, or the store's address"
    if status in (401, 403) or names & CREDENTIAL_ERRORS or (not status and isinstance(root, PermissionError)):
        return f"access denied ({label})", access
    if status in (404, 410) or (not status and isinstance(root, FileNotFoundError)):
        return f"no such file ({label})", "correct the path"
    if status == 416:
        return "is shorter than when it was opened", "leave the data alone during a run and start again"
    if status:
        return f"refused ({label})", f"check the address; {access}"
    if any(isinstance(link, TimeoutError) or "Timeout" in type(link).__name__ for link in chain):
        return f"no answer within {timeout:g} s", None
    if getattr(root, "errno", None) == errno.ENOSPC:
        return f"no space for it in {tempfile.gettempdir()}", "name another folder in TMPDIR"
    if isinstance(root, EOFError):
        return f"the connection ended early ({root})", None
    if any("Certificate" in name or "CertVerification" in name for name in names):
        return f"the server's certificate is not trusted ({label})", "install the authority's, or correct the address"
    if isinstance(root, (ValueError, TypeError, AttributeError, LookupError)) or "ParamValidationError" in names:
        return f"not an address that can be fetched ({label})", "check how it is written"
    return f"the connection failed ({label})", None


def chain_of(error: BaseException) -> list[BaseException]:
    """An exception and the ones that caused it, the first cause last."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    return chain


def status_of(chain: list[BaseException]) -> tuple[int | None, str]:
    """The HTTP status and the store's error code (S3's names) in a chain of exceptions, as far as they are known."""
    status, code = None, ""
    for link in chain:
        response = getattr(link, "response", None)
        if isinstance(response, dict):  # botocore
            status = status or response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            named = str(response.get("Error", {}).get("Code", ""))
            code = code or ("" if named.isdigit() else named)
        told = [vars(link).get(name) for name in ("status", "status_code", "code")]  # aiohttp, Azure, gcsfs
        told.append(getattr(response, "status_code", None))  # requests
        statuses = [value for value in told if isinstance(value, int) and 300 <= value < 600]
        if statuses:
            status = status or statuses[0]
    return status, code
