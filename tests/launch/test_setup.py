"""What `make` sets up: the constraints hold what pyproject.toml asks for, and a missing Python is said clearly."""

import os
import shutil
import subprocess
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]


def test_constraints_pin_every_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(line.count("==") == 1 and "/" not in line for line in lines)  # exact versions, no addresses
    pins = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
    assert list(pins) == sorted(pins)
    for text in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        requirement = Requirement(text)
        pinned = pins.get(canonicalize_name(requirement.name))
        assert pinned, f"{requirement.name} is not in constraints.txt"
        assert requirement.specifier.contains(pinned), f"{requirement.name}=={pinned}, but pyproject.toml says {text}"


def test_the_versions_of_vllm_are_exact_and_fit() -> None:
    from megavlm.vllm.environment import FITTING, check_versions

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [line for line in (ROOT / "constraints-vllm.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(line.count("==") == 1 and "/" not in line for line in lines)
    pins = dict(line.split("==") for line in lines)
    check_versions(pins, "constraints-vllm.txt")
    (extra,) = (Requirement(text) for text in project["optional-dependencies"]["vllm"] if text.startswith("vllm"))
    assert all(extra.specifier.contains(version) for version in FITTING["vllm"])
    (extra,) = (
        Requirement(text) for text in project["optional-dependencies"]["vllm"] if text.startswith("transformers")
    )
    assert {"==" + version for version in FITTING["transformers"]} > {str(extra.specifier)}  # one that was tried


def test_without_python_312_make_says_so(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    make = shutil.which("make")
    nothing = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "PYTHON"))}
    nothing |= {"PATH": str(tmp_path), "HOME": str(tmp_path), "PYENV_ROOT": str(tmp_path)}
    done = subprocess.run([make, "test"], cwd=tmp_path, env=nothing, capture_output=True, text=True)
    assert done.returncode == 2
    assert "megavlm needs Python 3.12" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_python_may_keep_its_bytecode() -> None:
    """Where it may not, each of the many interpreters of the tests compiles torch and Megatron for itself."""
    show = 'show: ; @echo "bytecode: [$$PYTHONDONTWRITEBYTECODE]"'
    variables = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    command = ["make", "--no-print-directory", f"--eval={show}", "show"]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=True)
    assert done.stdout == "bytecode: []\n"
