"""Where TE comes from: it is installed, or a set of packages lies beside the checkout; else its tests are skipped."""

import fcntl
import hashlib
import importlib.util
import os
import tarfile
import tempfile
from pathlib import Path

import pytest
from forkserver import OtherServer

ARCHIVE = Path(__file__).parents[3] / "shared" / "gpu" / "hopper-site.tar.xz"
# TE and what it needs. The set has other packages, too, but these processes are to have Megatron as it is installed.
PARTS = (
    "transformer_engine",
    "cudnn",
    "nvidia_cudnn_frontend",
    "nvdlfw_inspect",
    "einops",
    "onnx",
    "ml_dtypes",
    "tvm_ffi",
)
BUILT_FOR = "2.11."  # torch: the set has an extension that was compiled against it


def server() -> OtherServer:
    """A server whose processes have TE. Skips the test if there is no TE here."""
    import torch

    if importlib.util.find_spec("transformer_engine") is not None:
        return OtherServer("te_cpu.preload", [])
    if not ARCHIVE.exists():
        pytest.skip("Transformer Engine is not installed: pip install -c constraints.txt -e '.[cuda]'")
    if not torch.__version__.startswith(BUILT_FOR):
        pytest.skip(f"{ARCHIVE.name} has an extension for torch {BUILT_FOR}x, but this is torch {torch.__version__}")
    return OtherServer("te_cpu.preload", [str(unpacked(ARCHIVE))])


def unpacked(archive: Path) -> Path:
    """A folder with the ``PARTS`` of an archive, unpacked by whoever asks first; it stays for the next runs."""
    with archive.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    cache = Path(tempfile.gettempdir()) / f"megavlm-te-{os.getuid()}"
    cache.mkdir(mode=0o700, exist_ok=True)
    assert cache.stat().st_uid == os.getuid(), f"{cache} is of somebody else"
    folder = cache / digest
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=cache) as new, tarfile.open(archive) as packed:
                whole = Path(new) / "site"  # so that a folder named by the digest is always complete
                needed = [member for member in packed if member.name.removeprefix("./").startswith(PARTS)]
                packed.extractall(whole, needed, filter="data")
                whole.rename(folder)
    return folder
