"""What several tests share: processors, and media files made on the spot."""

import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # as the processes that tests start and compare with


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes, too")
    parser.addoption("--gpu", action="store_true", help="run only the tests that need a GPU")


def pytest_collection_modifyitems(config, items):
    # Two processes of pytest-xdist take whole files: the longest first, so that both end at about the same time
    longest = (
        "test_scripts",
        "test_distributed",
        "test_context_parallel",
        "test_pipeline_parallel",
        "test_tensor_parallel",
        "test_together",
        "test_family_parallel",
        "test_faults",
        "test_matrix",
        "test_survival",
        "test_hub",
    )
    items.sort(key=lambda item: longest.index(item.path.stem) if item.path.stem in longest else len(longest))
    if config.getoption("--gpu"):
        items[:] = [item for item in items if needs_a_gpu(item)]
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="takes minutes; run with --slow"))


def needs_a_gpu(item: pytest.Item) -> bool:
    return any("needs a GPU" in mark.kwargs.get("reason", "") for mark in item.iter_markers("skipif"))


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory) -> Path:
    """The directory of a freshly made tiny checkpoint."""
    from util.tiny_model import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def processor(tiny_path):
    """The processor of the tiny checkpoint."""
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(tiny_path)


@pytest.fixture(scope="session")
def official_processor():
    """The published processor of Qwen2-VL: the folder in QWEN2_VL_REFERENCE, or one that lies beside the repository."""
    from transformers import AutoProcessor

    folder = Path(os.environ.get("QWEN2_VL_REFERENCE", ROOT.parent / "shared" / "qwen2_vl_reference"))
    if not folder.is_dir():
        pytest.skip("the published processor is not here; name its folder in QWEN2_VL_REFERENCE")
    return AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="session", params=["tiny", "official"])
def any_processor(request):
    """The tiny processor, then the published one."""
    return request.getfixturevalue({"tiny": "processor", "official": "official_processor"}[request.param])


@pytest.fixture(scope="session")
def picture():
    """A function (height, width, seed) -> uint8 (height, width, 3) with smooth areas, edges and some noise."""

    def make(height: int, width: int, seed: int = 0) -> np.ndarray:
        random = np.random.default_rng(seed)
        rows, columns = np.mgrid[0:height, 0:width]
        waves = [np.sin(rows / random.uniform(5, 40) + columns / random.uniform(5, 40)) for _ in range(3)]
        pixels = np.stack(waves, axis=2) * 90 + 128 + random.normal(0, 6, (height, width, 3))
        pixels[height // 4 : height // 2, width // 4 : width // 2] = random.integers(0, 256, 3)
        return pixels.clip(0, 255).astype(np.uint8)

    return make


@pytest.fixture(scope="session")
def write_video():
    """A function (path, frames, fps) that writes uint8 frames (F, H, W, 3) as H.264 and returns the path as text."""

    def write(path: Path, frames: list[np.ndarray], fps: int | Fraction) -> str:
        import av

        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=fps, options={"g": "5", "threads": "1"})
            stream.height, stream.width = frames[0].shape[:2]
            stream.pix_fmt = "yuv420p"
            for pixels in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
        return str(path)

    return write


@pytest.fixture(scope="session")
def decode_all():
    """A function path -> every frame of a video as uint8 (F, H, W, 3), decoded from the start by PyAV alone."""

    def decode(path: str) -> np.ndarray:
        import av

        with av.open(path) as container:
            return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])

    return decode
