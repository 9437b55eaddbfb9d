"""Greedy answers of vLLM from a Hugging Face folder, in fp32 on a CPU, for comparison with others.

vLLM has an environment of its own (`make vllm`), whose Python runs this file as a program. It reads a JSON object with
the arguments of `vllm_tokens` from its standard input; the last line of its output is the result as JSON.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_SECONDS = 900.0  # it takes up to two minutes to start on a busy machine


def vllm_python() -> Path | None:
    """The Python of the environment that `make vllm` makes; None if it is not there."""
    python = Path(sys.prefix) / "vllm" / "bin" / "python"
    return python if python.exists() else None


def vllm_tokens(python: Path, folder: Path, prompts: Sequence[dict[str, Any]], max_new_tokens: int) -> list[list[int]]:
    """The tokens of the answers to prompts, each with its `text` and the paths of its `images`.

    generation_config.json of the folder says which tokens end an answer. Raises RuntimeError with the end of what vLLM
    has printed if it fails.
    """
    asked = {"folder": str(folder), "prompts": prompts, "max_new_tokens": max_new_tokens}
    done = subprocess.run(
        [python, "-P", __file__], input=json.dumps(asked), capture_output=True, text=True, timeout=_SECONDS
    )
    if done.returncode:
        raise RuntimeError(f"vLLM ended with status {done.returncode}:\n{done.stderr[-3000:]}")
    found: list[list[int]] = json.loads(done.stdout.splitlines()[-1])
    return found


def _answer(folder: str, prompts: list[dict[str, Any]], max_new_tokens: int) -> list[list[int]]:
    from PIL import Image
    from vllm import LLM, SamplingParams

    model = LLM(
        folder,
        dtype="float32",
        max_model_len=512,
        max_num_seqs=32,
        enforce_eager=True,
        kv_cache_memory_bytes=2**28,
        enable_chunked_prefill=False,
        skip_mm_profiling=True,
        disable_log_stats=True,
    )
    asked = []
    for prompt in prompts:
        pictures = [Image.open(file).convert("RGB") for file in prompt["images"]]
        asked.append({"prompt": prompt["text"], **({"multi_modal_data": {"image": pictures}} if pictures else {})})
    answers = model.generate(asked, SamplingParams(temperature=0, max_tokens=max_new_tokens), use_tqdm=False)
    return [list(answer.outputs[0].token_ids) for answer in answers]


if __name__ == "__main__":
    # One process that compiles nothing: it starts in seconds.
    os.environ |= {"TORCHDYNAMO_DISABLE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    print(json.dumps(_answer(**json.load(sys.stdin))), flush=True)
