"""Answers prompts with vLLM and writes how long it took; ``benchmarks.vllm_engine`` runs it with vLLM's Python.

python vllm_child.py TASK.json RESULT.json
"""

import json
import sys
import time
from pathlib import Path


def main() -> None:
    from PIL import Image
    from vllm import LLM, SamplingParams, __version__

    task = json.loads(Path(sys.argv[1]).read_text())
    begin = time.perf_counter()
    llm = LLM(
        model=task["model"], dtype="float32", max_model_len=task["max_model_len"], max_num_seqs=task["places"],
        limit_mm_per_prompt={"image": 1, "video": 0}, enforce_eager=task["eager"], seed=0,
    )  # fmt: skip
    started = time.perf_counter() - begin

    def prompt(question: dict) -> dict:
        pictures = {"image": Image.open(question["picture"]).convert("RGB")} if question["picture"] else None
        return {"prompt": question["text"], **({"multi_modal_data": pictures} if pictures else {})}

    def answer(questions: list[dict], tokens: int) -> list:
        # logprobs=0: of the sampled tokens alone
        sampling = SamplingParams(n=task["answers"], temperature=1.0, max_tokens=tokens, ignore_eos=True, logprobs=0)
        return llm.generate([prompt(question) for question in questions], sampling, use_tqdm=False)

    answer(task["warm_up"], 4)
    results = {}
    for name, questions in task["questions"].items():
        begin, cpu = time.perf_counter(), time.process_time()
        outputs = answer(questions, task["tokens"])
        results[name] = {
            "seconds": time.perf_counter() - begin,
            "cpu_seconds": time.process_time() - cpu,
            "prompt_tokens": [len(output.prompt_token_ids) for output in outputs],
            "tokens": sum(len(one.token_ids) for output in outputs for one in output.outputs),
        }
    Path(sys.argv[2]).write_text(json.dumps({"version": __version__, "seconds_of_start": started, "of": results}))


if __name__ == "__main__":
    main()
