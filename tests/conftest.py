"""A small model folder, and real pictures and videos in files; in which order and with how many threads tests run."""

import gc
import os
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import skimage.data
from PIL import Image

# Before torch is imported. Tensors are small here: several threads of torch wait for each other far longer than they
# compute, the more so while other processes want the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Tests of several ranks stay on one of two workers: each such test keeps both cores busy by itself, and two of them
# side by side wait for each other's turns in every collective. The other worker takes all other files meanwhile; those
# APART too, which use the pools of ranks little or not at all.
RANKS = "tests/distributed/"
APART = ("test_dry_run.py", "test_kill.py", "test_life.py", "test_full_disk.py", "test_pool.py", "test_vllm.py",
         "test_vllm_refusals.py")  # fmt: skip
FIRST = (RANKS, "tests/commands/")  # what takes minutes, so that neither worker ends with it alone


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files in the order of FIRST, the others as they come."""
    items.sort(key=lambda item: next((n for n, start in enumerate(FIRST) if item.nodeid.startswith(start)), len(FIRST)))


def pytest_collection_finish() -> None:
    """Takes all modules out of garbage collection, which code under test asks for and which would take a second."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """Which tests run on one worker, one after the other.

    pytest-xdist's own way, `--dist loadgroup` and a mark, does not work with this pytest: it writes the group into
    `Item._nodeid`, which pytest 9.2 no longer reads.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return RANKS if file.startswith(RANKS) and not file.endswith(APART) else file

    return Scheduling(config, log)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    from megavlm.demo.model_folder import make_model_folder

    return make_model_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def make_renderer(model_folder):
    """A renderer with the given data settings."""
    from megavlm.config.settings import DataSettings
    from megavlm.data.renderer import Renderer

    return lambda **settings: Renderer(model_folder, DataSettings(**settings))


@pytest.fixture(scope="session")
def renderer(make_renderer):
    return make_renderer(seq_length=4096)


@pytest.fixture(scope="session")
def media(tmp_path_factory) -> SimpleNamespace:
    """Files of many kinds in one folder: `media.base`, their names, and `media.find`."""
    from megavlm.media.files import in_folder

    base = tmp_path_factory.mktemp("media")
    pictures = ["large.jpg", "wide.png", "grey.png", "alpha.png", "tall.gif", "tiny.webp", "cmyk.jpg", "turned.jpg"]
    astronaut = Image.fromarray(skimage.data.astronaut())
    astronaut.save(base / "large.jpg", quality=92)
    astronaut.crop((0, 0, 300, 40)).save(base / "wide.png")
    Image.fromarray(skimage.data.coins()).save(base / "grey.png")
    Image.fromarray(skimage.data.chelsea()).convert("RGBA").resize((61, 99)).save(base / "alpha.png")
    astronaut.convert("P").resize((33, 170)).save(base / "tall.gif")
    astronaut.resize((17, 5)).save(base / "tiny.webp")
    astronaut.convert("CMYK").resize((120, 90)).save(base / "cmyk.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    astronaut.crop((100, 0, 300, 400)).save(base / "turned.jpg", exif=exif)
    video(base / "clip.mp4", frames=23, fps=10, size=(96, 64))
    video(base / "long.webm", frames=40, fps=8, size=(64, 64))
    for number in range(5):
        astronaut.rotate(10 * number).resize((80, 48)).save(base / f"frame{number}.png")
    return SimpleNamespace(
        base=base,
        find=in_folder(base),
        pictures=pictures,
        frames=[f"frame{number}.png" for number in range(5)],
    )


def video(path: Path, frames: int, fps: int, size: tuple[int, int]) -> None:
    """A video of a photograph passing by; `size` is (width, height)."""
    scene = skimage.data.chelsea()
    codec = "libvpx" if path.suffix == ".webm" else "mpeg4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for number in range(frames):
            view = np.ascontiguousarray(scene[50 : 50 + size[1], 4 * number : 4 * number + size[0]])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(view, format="rgb24")))
        container.mux(stream.encode())
