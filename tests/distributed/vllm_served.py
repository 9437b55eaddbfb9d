"""Real vLLM for tests: engines with a server, one of a kind for each file that asks; skipped where it is not installed.

The fixtures are known to all tests of this folder (conftest.py).
"""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file
from toy import read_samples, write_records

from megavlm.base.errors import UserError

ONE = SimpleNamespace(world_host=SimpleNamespace(size=lambda: 1, rank=lambda: 0), dp_rank=0)  # groups of one process
# The same float32 numbers, summed in another order by other kernels; over four layers 5e-6 was seen.
CLOSE = 1e-4


class FolderWeights:
    """The weights of a Hugging Face folder, in buckets."""

    adapter = None

    def __init__(self, folder: Path):
        self.folder = folder

    def buckets(self, max_bytes: int, *, merged: bool = True):
        tensors = list(load_file(self.folder / "model.safetensors").items())
        yield from (tensors[start : start + 40] for start in range(0, len(tensors), 40))


def vllm_settings(folder: Path, **vllm):
    from megavlm.config.settings import Settings

    return Settings(
        model={"hf": str(folder)},
        data={"seq_length": 512},
        train={"precision": "fp32"},
        rollout={"engine": "vllm", "max_sequences": 64, "cache_gib": 0.25, "ahead": 1, "partial": "drop", "vllm": vllm},
    )


def vllm_engine(folder: Path, output: Path, groups=ONE, **vllm):
    from megavlm.vllm.engine import VllmEngine

    return VllmEngine(vllm_settings(folder, **vllm), groups, FolderWeights(folder), output)


@pytest.fixture(scope="module")
def python() -> Path:
    """The Python that has vLLM."""
    from megavlm.vllm.environment import check_environment, python_of

    found = python_of(vllm_settings(Path("nowhere")))
    try:
        check_environment(found)
    except UserError as error:
        pytest.skip(error.message)
    return found


@pytest.fixture(scope="module")
def served(python, toys, tmp_path_factory):
    """An engine with a server, which has the weights of the dense toy."""
    engine = vllm_engine(toys.folder("dense"), tmp_path_factory.mktemp("vllm"))
    engine.sync()
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def served_moe(python, toys, tmp_path_factory):
    """As ``served``, of the toy with experts."""
    engine = vllm_engine(toys.folder("moe"), tmp_path_factory.mktemp("vllm_moe"))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def asked(toys):
    """Fifty questions with and without pictures and videos: their records, and the file."""
    from test_generate import mixed_questions

    records = mixed_questions(toys.root)
    records[0]["messages"][0]["content"] += " Why?" * 60  # longer than a block of vLLM's prefix cache, 128 on a CPU
    for video in (video for record in records for video in record.get("videos", [])):
        video["frames"] = video["frames"][1:] + video["frames"][:1]  # so that the two images of a step differ
    return records, write_records(toys.root / "for_vllm.jsonl", records)


@pytest.fixture(scope="module")
def prompts(toys, asked):
    """prompts(indices, answers): that many answers to these questions."""
    found = prompts_of(toys, "dense", asked)
    seeds = lambda index, count: tuple(100 * index + n for n in range(count))
    return lambda indices, answers=1: [replace(found[i], seeds=seeds(i, answers)) for i in indices]


@pytest.fixture(scope="module")
def sampling(toys):
    """sampling(tokens, temperature): how to sample, without vision tokens."""
    from test_generate import BANNED
    from transformers import AutoTokenizer

    from megavlm.rollout.answerer import stop_tokens
    from megavlm.rollout.engine import Sampling

    tokenizer = AutoTokenizer.from_pretrained(toys.folder("dense"))
    banned = tuple(tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in BANNED)
    stop = stop_tokens(toys.folder("dense"), tokenizer)
    return lambda tokens, temperature=0.0, **more: Sampling(tokens, temperature, stop=stop, banned=banned, **more)


def prompts_of(toys, kind: str, asked) -> list:
    from megavlm.data.renderer import Renderer
    from megavlm.rollout.engine import Prompt

    settings = vllm_settings(toys.folder(kind))
    samples = read_samples(asked[1], Renderer(settings.model.hf, settings.data), "prompt")
    return [Prompt(sample, (0,)) for sample in samples]


def by_index(answered) -> dict[int, list]:
    found: dict[int, list] = {}
    for one in answered:
        assert one.prompt.sample.index not in found, "a prompt was answered twice"
        found[one.prompt.sample.index] = one.answers
    return found
