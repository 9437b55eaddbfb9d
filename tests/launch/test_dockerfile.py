"""The Dockerfile, as far as a test can check it. `make lint` runs hadolint, `python docker/check.py` its steps."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("docker_check", ROOT / "docker/check.py")
docker_check = importlib.util.module_from_spec(spec)
spec.loader.exec_module(docker_check)
INSTRUCTIONS = docker_check.instructions()


def test_every_stage_ends_without_root() -> None:
    users = {}
    for name, arguments in INSTRUCTIONS:
        if name == "FROM":
            users[arguments] = None
        elif name == "USER":
            users[list(users)[-1]] = arguments
    assert users == {"${PYTORCH_IMAGE} AS built": None, "built AS test": "megavlm", "built": "megavlm"}


def test_what_is_compiled_for_the_image_stays_the_images() -> None:
    """Beside what torch and Transformer Engine are, what Transformer Engine was compiled against; no test's peers."""
    command = next(arguments for name, arguments in INSTRUCTIONS if name == "RUN" and arguments.startswith("grep"))
    grep = command.partition(" > ")[0].replace("/opt/megavlm/", "")
    kept = subprocess.run(["bash", "-c", grep], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    pinned = [x for x in (ROOT / "constraints.txt").read_text().splitlines() if not x.startswith("#")]
    left_out = {re.match(r"[a-z]+", x)[0] for x in set(pinned) - set(kept)}
    assert left_out == {"torch", "torchvision", "triton", "nvidia", "cuda", "numpy", "protobuf", "trl", "verl"}
    assert {"transformers", "megatron-core", "opentelemetry-proto"} <= {x.partition("==")[0] for x in kept}


def test_a_hidden_package_is_found(tmp_path: Path) -> None:
    """One inside the environment, one that is missing, and one of the interpreter below it."""
    site = tmp_path / f"lib/python3.{sys.version_info.minor}/site-packages"
    (site / "numpy").mkdir(parents=True)
    (site / "numpy/__init__.py").touch()
    code = (
        f"import runpy, sys; sys.prefix = {str(tmp_path)!r}; sys.path.insert(0, {str(site)!r});"
        "sys.argv = ['', 'numpy', 'onnx_is_missing', 'json'];"
        "runpy.run_path('docker/not_hidden.py', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert [line.partition(":")[0] for line in done.stderr.splitlines()] == ["numpy", "onnx_is_missing"]
