"""The Dockerfile, as far as it can be checked without building it: its syntax, and which packages stay the image's."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
INSTRUCTIONS = {"ARG", "FROM", "ENV", "RUN", "COPY", "USER", "WORKDIR", "CMD"}


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) of each logical line; continuation lines joined."""
    lines = [x for x in (ROOT / "docker/Dockerfile").read_text().splitlines() if x and not x.startswith("#")]
    logical = re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()
    return [tuple(line.split(maxsplit=1)) for line in logical]


def test_syntax() -> None:
    parts = instructions()
    assert {name for name, _ in parts} <= INSTRUCTIONS
    assert [name for name, _ in parts][:2] == ["ARG", "FROM"]
    assert [arguments for name, arguments in parts if name == "USER"] == ["megavlm"]
    for name, arguments in parts:
        if name == "COPY":
            *sources, _ = arguments.split()
            assert all((ROOT / source).exists() for source in sources)


def test_shellcheck_of_the_commands() -> None:
    script = "\n".join(["#!/bin/bash", *(arguments for name, arguments in instructions() if name == "RUN")])
    shellcheck = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run([shellcheck, "-"], input=script, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_what_is_compiled_for_the_image_stays_the_images() -> None:
    command = next(arguments for name, arguments in instructions() if name == "RUN" and arguments.startswith("grep"))
    grep = command.partition(" > ")[0].replace("/opt/megavlm/", "")
    kept = subprocess.run(["bash", "-c", grep], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    pinned = [x for x in (ROOT / "constraints.txt").read_text().splitlines() if not x.startswith("#")]
    left_out = {re.match(r"[a-z]+", x)[0] for x in set(pinned) - set(kept)}
    assert left_out == {"torch", "torchvision", "triton", "nvidia", "cuda"}
    assert {"transformers", "megatron-core", "numpy"} <= {x.partition("==")[0] for x in kept}
