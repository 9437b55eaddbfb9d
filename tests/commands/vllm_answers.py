"""Run by the Python that has vLLM: greedy answers of a Hugging Face folder, as tokens.

    python vllm_answers.py FOLDER '[{"text": …, "images": [FILE, …]}, …]' TOKENS

The last line of the output is a list of lists of tokens as JSON.
"""

import json
import os
import sys

# One process that compiles nothing: it starts in seconds.
os.environ |= {"TORCHDYNAMO_DISABLE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

from PIL import Image
from vllm import LLM, SamplingParams


def main() -> None:
    folder, asked, tokens = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
    model = LLM(
        folder,
        dtype="float32",
        max_model_len=512,
        max_num_seqs=4,
        enforce_eager=True,
        kv_cache_memory_bytes=2**28,
        enable_chunked_prefill=False,
        skip_mm_profiling=True,
        disable_log_stats=True,
    )
    prompts = []
    for one in asked:
        pictures = [Image.open(file).convert("RGB") for file in one["images"]]
        prompts.append({"prompt": one["text"], **({"multi_modal_data": {"image": pictures}} if pictures else {})})
    # generation_config.json of the folder says which tokens end an answer
    answers = model.generate(prompts, SamplingParams(temperature=0, max_tokens=tokens), use_tqdm=False)
    print(json.dumps([list(answer.outputs[0].token_ids) for answer in answers]), flush=True)


if __name__ == "__main__":
    main()
