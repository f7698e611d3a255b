"""Where images and videos come from: files of this machine, remote ones (fetch.py), and what is kept on disk of them.

These are decoded frames (cache.py) and what a frozen vision tower makes of them (features.py). Training, evaluation and
both test scripts read media only through this.
"""

from collections.abc import Callable
from functools import partial

from util import vision
from util.data import fetch
from util.data.cache import FrameCache
from util.data.features import FeatureCache
from util.data.fetch import FetchSettings

MOST_SIZES = 2**17  # of remote images, remembered at a time by a process


class MediaReader:
    """Calls `vision.load` or `vision.read_grid` for the media of a sample; may be sent to data workers."""

    def __init__(self, config: FetchSettings | None = None) -> None:
        """`config`: a Config; None: the defaults, and no cache."""
        names = FetchSettings.__dataclass_fields__
        self.settings = FetchSettings(**{name: getattr(config, name) for name in names} if config else {})
        directory = getattr(config, "cache_dir", None)
        identity = partial(fetch.identity, settings=self.settings)
        self.sizes: dict[str, tuple[int, int]] = {}  # of remote images, by address
        self.cache = FrameCache(directory, config.cache_max_gib, identity) if directory else None
        self.features = FeatureCache(self.cache) if self.cache else None

    def each(self, read: Callable, items: list[dict], budget: vision.Budget) -> list:
        """`read` for every item, in order. Raises ValueError that names the file.

        Remote files of a sample are fetched side by side; with a cache only those that are not in it, one by one.
        """
        whole = read is vision.load
        if self.cache is None:
            return [read(item, budget) for item in fetch.localise(items, self.settings, whole_images=whole)]
        cached = self.features.load if whole else self.cache.read_grid
        return [cached(item, budget, partial(self._fetch_and_read, read, whole)) for item in items]

    def image_sizes(self, items: list[dict]) -> list[tuple[int, int]]:
        """Width and height in pixels of image items as people see them, from their headers. Raises as `each` does.

        Each process asks for a remote image's size once.
        """
        paths = [item["image"] for item in items]
        unknown = [item for item in items if item["image"] not in self.sizes]
        found = fetch.localise(unknown, self.settings, whole_images=False)
        new_sizes = {}
        for item, opened in zip(unknown, found, strict=True):
            new_sizes[item["image"]] = vision.open_image(opened["image"]).size
        sizes = [new_sizes.get(path) or self.sizes[path] for path in paths]
        if len(self.sizes) < MOST_SIZES:
            for path, size in new_sizes.items():
                # A local file may change, and a `data:` URI is a long text: neither is remembered.
                if fetch.scheme_of(path) not in ("", "file", "data"):
                    self.sizes[path] = size
        return sizes

    def statistics(self) -> dict[str, float]:
        """The share of media that came out of the cache so far, for the log; without a cache an empty dict."""
        ratios = {}
        if self.cache:
            ratios["cache_hit_ratio"] = round(self.cache.statistics()["hit_ratio"], 4)
        if self.features and self.features.is_open:
            ratios["feature_hit_ratio"] = round(self.features.statistics()["hit_ratio"], 4)
        return ratios

    def _fetch_and_read(self, read: Callable, whole: bool, item: dict, budget: vision.Budget):
        (item,) = fetch.localise([item], self.settings, whole_images=whole)
        return read(item, budget)
