"""Runs the steps of the Dockerfile without its image and without Docker, as far as that goes.

    .venv/bin/python docker/check.py [FOLDER …]

A folder stands for the image: links to those packages of this environment that the Dockerfile leaves to the image. Each
FOLDER holds further ones, such as Transformer Engine; steps that need it are left out otherwise. Everything else must
come from the Dockerfile's own steps. Steps that need the image itself, or would change this machine, are named and left
out. What git tracks is copied. Takes some minutes and 2 GB in the temporary folder, and pip needs its index.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OF_THE_IMAGE = r"(torch|torchgen|functorch|torchvision|triton|nvidia|cuda|numpy|onnx|transformer_engine)"
LEFT_OUT = {
    ".nv": "needs the image's torch",
    "useradd": "would change this machine",
    "chown": "would change this machine",
}


def instructions(file: Path = ROOT / "docker/Dockerfile") -> list[tuple[str, str]]:
    """(instruction, arguments) of each logical line; continuation lines joined."""
    lines = [line for line in file.read_text().splitlines() if line and not line.startswith("#")]
    logical = re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()
    return [(name, arguments) for name, _, arguments in (line.partition(" ") for line in logical)]


def stand_in(folder: Path) -> None:
    """Links in ``folder`` to the packages of this environment that the image would bring."""
    import numpy  # whichever folder has the packages of this environment

    site = Path(numpy.__file__).parents[1]
    (folder / "google").mkdir(parents=True)
    (folder / "google/protobuf").symlink_to(site / "google/protobuf")
    for path in site.iterdir():
        if re.match(rf"{OF_THE_IMAGE}(?![a-z])|protobuf-", path.name):
            (folder / path.name).symlink_to(path)


def main() -> int:
    """Status 1 as soon as a step fails."""
    with tempfile.TemporaryDirectory(prefix="megavlm-image-") as name:
        folder = Path(name)
        stand_in(folder / "packages")
        image = [folder / "packages", *(Path(more).resolve() for more in sys.argv[1:])]
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
        python = Path(sys.executable).resolve()
        done, left_out = [], []
        for instruction, arguments in instructions():
            words = arguments.replace("/opt/", f"{folder}/")
            reason = next((why for mark, why in LEFT_OUT.items() if mark in arguments), None)
            if "transformer_engine" in arguments and not any((path / "transformer_engine").exists() for path in image):
                reason = "needs Transformer Engine"
            if instruction == "RUN" and reason:
                left_out.append(f"{arguments} ({reason})")
            elif instruction == "RUN":
                print(f"RUN {arguments}", flush=True)
                words = words.replace("python3 -m venv", f"{python} -m venv")
                if subprocess.run(["bash", "-euc", words], env=environment, cwd=folder).returncode:
                    print(f"failed: {arguments}", file=sys.stderr)
                    return 1
                done.append(arguments)
                for site in folder.glob("venv/lib/python*/site-packages"):
                    (site / "image.pth").write_text("".join(f"{path}\n" for path in image))
            elif instruction == "ENV":
                pairs = re.findall(r'(\w+)=("[^"]*"|\S+)', words)
                environment |= {k: v.strip('"').replace("${PATH}", environment["PATH"]) for k, v in pairs}
            elif instruction == "COPY":
                source = arguments.split()[0]
                (folder / "megavlm").mkdir(exist_ok=True)
                names = ["constraints.txt"] if source != "." else ["."]
                tracked = subprocess.run(
                    ["git", "ls-files", *names], cwd=ROOT, capture_output=True, text=True, check=True
                )
                for file in tracked.stdout.splitlines():
                    (folder / "megavlm" / file).parent.mkdir(parents=True, exist_ok=True)
                    (folder / "megavlm" / file).write_bytes((ROOT / file).read_bytes())
        print("\nrun: " + "\n     ".join(done) + "\nleft out: " + "\n          ".join(left_out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
