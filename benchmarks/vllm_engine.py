"""Tokens per second of the built-in engine, beside vLLM's with the same model, prompts and cores, on one process.

    python -m benchmarks.vllm_engine [--python PYTHON] [--only megavlm] [--json FILE]

16 questions without a picture, and 16 others with a picture of 64 visual tokens each, get 8 sampled answers of 32
tokens. The model has random weights in float32: a decoder with 8 layers of width 512 and 32,768 tokens, and a tower
with 4 layers of width 256. vLLM runs in its own environment, in one process with as many threads, and shares the cache
of a prompt between its answers. No token ends an answer, so both make the same number of tokens. Both return the
log-probabilities of sampled tokens, and both have answered other questions before. Beside the seconds by the clock are
those of the processor, which other programs on the machine influence less; the smaller of both ratios counts.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.ranks import versions

MIN_RATIO, PROMPTS, ANSWERS, TOKENS, SIDE, LENGTH = 0.5, 16, 8, 32, 256, 512
TEXT = {
    "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 32768,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 5_000_000, "mrope_section": [12, 10, 10], "mrope_interleaved": True,
    },
}  # fmt: skip
VISION = {"hidden_size": 256, "intermediate_size": 1024, "depth": 4, "num_heads": 4}


def make(root: Path, prompts: int) -> tuple[Path, dict[str, list[dict]]]:
    """Writes a model folder and pictures; returns the folder, and the questions of each kind and of the warm-up."""
    import skimage.data
    from PIL import Image

    from megavlm.demo.model_folder import make_model_folder

    photograph = Image.fromarray(skimage.data.astronaut()).convert("RGB")
    for number in range(prompts + 1):  # all different, so that no engine has a picture's features already
        photograph.crop((10 * number, 0, 10 * number + SIDE, SIDE)).save(root / f"{number}.png")
    say = lambda text: [{"role": "user", "content": text}]
    # the differing number comes first, so that no prompt begins like another one
    plain = lambda n: {"messages": say(f"{n}: " + "Describe a person who walks through the garden. " * 4)}
    seen = lambda n: {"messages": say(f"{n}: <image>What is in the picture?"), "images": [f"{n}.png"]}
    numbers = range(1, prompts + 1)
    questions = {
        "without pictures": [plain(n) for n in numbers], "with pictures": [seen(n) for n in numbers],
        "warm-up": [plain(0), seen(0)],
    }  # fmt: skip
    return make_model_folder(root / "model", text=TEXT, vision=VISION, max_pixels=SIDE * SIDE), questions


def ours(folder: Path, root: Path, questions: dict[str, list[dict]]) -> dict:
    """Seconds of the built-in engine, and how they are divided."""
    from megavlm.config.settings import Settings
    from megavlm.data.renderer import Renderer
    from megavlm.media.files import in_folder
    from megavlm.rollout.builtin import BuiltinEngine
    from megavlm.rollout.engine import Prompt, Sampling
    from megavlm.runtime.session import start

    settings = Settings(model={"hf": folder, "load": folder}, train={"precision": "fp32"})
    session, renderer = start(settings, training=False), Renderer(folder, settings.data)
    seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def timer(part: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        seconds[part] += time.perf_counter() - begin

    engine = BuiltinEngine(
        session.vlm, places=PROMPTS * ANSWERS, cache_gib=1.0, cache_setting="cache_gib", prompt_tokens=2048,
        chunk_tokens=1024, timer=timer,
    )  # fmt: skip

    def answer(some: list[dict], tokens: int) -> dict:
        seconds.clear()
        begin, cpu = time.perf_counter(), time.process_time()
        prompts = (
            Prompt(
                renderer.encode(question, in_folder(root), "question", kind="prompt", index=index),
                tuple(range(index * ANSWERS, (index + 1) * ANSWERS)),
            )
            for index, question in enumerate(some)
        )
        answered = list(engine.generate(prompts, Sampling(tokens, temperature=1.0)))
        total, cpu = time.perf_counter() - begin, time.process_time() - cpu
        parts = {part: round(value, 3) for part, value in seconds.items()}
        return {
            "seconds": total, "cpu_seconds": cpu,
            "seconds_of": {**parts, "other": round(total - sum(parts.values()), 3)},
            "prompt_tokens": [
                len(one.prompt.sample.input_ids)
                for one in sorted(answered, key=lambda one: one.prompt.sample.index)
            ],
            "tokens": sum(len(answer.tokens) for one in answered for answer in one.answers),
        }  # fmt: skip

    answer(questions["warm-up"], 4)
    return {"of": {name: answer(some, TOKENS) for name, some in questions.items() if name != "warm-up"}}


def theirs(python: str, folder: Path, root: Path, questions: dict[str, list[dict]], threads: int, eager: bool) -> dict:
    """What ``vllm_child.py`` has written."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)

    def for_vllm(question: dict) -> dict:
        text = question["messages"][0]["content"]
        content = text.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>")
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        return {"text": rendered, "picture": str(root / question["images"][0]) if "images" in question else None}

    of = {name: [for_vllm(question) for question in some] for name, some in questions.items()}
    task = {
        "model": str(folder), "max_model_len": LENGTH, "places": PROMPTS * ANSWERS, "answers": ANSWERS,
        "tokens": TOKENS, "eager": eager, "warm_up": of.pop("warm-up"), "questions": of,
    }  # fmt: skip
    (root / "task.json").write_text(json.dumps(task))
    environment = {
        **os.environ, "OMP_NUM_THREADS": str(threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "PYTHONPATH": "",
    }  # fmt: skip
    child = Path(__file__).with_name("vllm_child.py")
    command = [python, str(child), str(root / "task.json"), str(root / "result.json")]
    subprocess.run(command, env=environment, cwd=root, check=True)
    return json.loads((root / "result.json").read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default=str(Path(sys.prefix) / "vllm/bin/python"), help="of vLLM's environment")
    parser.add_argument("--only", choices=["megavlm", "vllm"], help="run one of the two")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each engine")
    parser.add_argument("--compiled", action="store_true", help="let vLLM compile the model, which takes minutes")
    parser.add_argument("--json", help="also write the results to this file")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    import torch

    torch.set_num_threads(args.threads)
    results = {}
    with tempfile.TemporaryDirectory(prefix="megavlm-vllm-") as temporary:
        root = Path(temporary)
        folder, questions = make(root, PROMPTS)
        if args.only != "megavlm":
            results["vllm"] = theirs(args.python, folder, root, questions, args.threads, not args.compiled)
        if args.only != "vllm":
            results["megavlm"] = ours(folder, root, questions)
    for name, result in results.items():
        for kind, found in result["of"].items():
            found["tokens_per_second"] = found["tokens"] / found["seconds"]
            found["tokens_per_cpu_second"] = found["tokens"] / found["cpu_seconds"]
            print(
                f"{name}, {kind}: {found['tokens']} tokens, {found['tokens_per_second']:.0f} per second, "
                f"{found['tokens_per_cpu_second']:.0f} per second of a processor {found.get('seconds_of', '')}"
            )
    if len(results) < 2:
        return 0
    ratios = {}
    for kind, found in results["megavlm"]["of"].items():
        other = results["vllm"]["of"][kind]
        assert (found["tokens"], found["prompt_tokens"]) == (other["tokens"], other["prompt_tokens"]), "not alike"
        ratios[kind] = [found[speed] / other[speed] for speed in ("tokens_per_second", "tokens_per_cpu_second")]
        print(f"{kind}: {ratios[kind][0]:.2f} of vLLM by the clock, {ratios[kind][1]:.2f} by the processor's")
    if args.json:
        content = {
            "versions": versions(), "threads": args.threads, "prompts": PROMPTS, "answers": ANSWERS,
            "tokens_of_an_answer": TOKENS, "vllm_compiled": args.compiled, **results, "ratios": ratios,
        }  # fmt: skip
        Path(args.json).write_text(json.dumps(content, indent=1) + "\n")
    return 0 if min(map(min, ratios.values())) >= MIN_RATIO else 1


if __name__ == "__main__":
    sys.exit(main())
