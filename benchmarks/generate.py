"""Tokens per second of the built-in engine, beside transformers' ``generate`` with the same model, on one process.

    python -m benchmarks.generate [--prompts N] [--json FILE]

32 questions, each with a photograph of 256 visual tokens, get 8 sampled answers of 32 tokens. The model has random
weights: a decoder with 16 layers of width 768 and a tower with 6 layers of width 256, in float32. transformers answers
all at once: ``generate`` with ``num_return_sequences=8``, padded on the left, with its attention for PyTorch. No token
ends an answer, so both make the same number of tokens.
"""

import argparse
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.ranks import versions

MIN_RATIO, PROMPTS, ANSWERS, TOKENS, SIDE = 3.0, 32, 8, 32, 512
TEXT = {
    "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 12,
    "num_key_value_heads": 4, "head_dim": 64,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 5_000_000, "mrope_section": [12, 10, 10], "mrope_interleaved": True,
    },
}  # fmt: skip
VISION = {"hidden_size": 256, "intermediate_size": 1024, "depth": 6, "num_heads": 8}
BANNED = ("image_pad", "video_pad", "vision_start", "vision_end")


def make(root: Path, prompts: int) -> tuple[Path, list[dict]]:
    """Writes a model folder and pictures; returns the folder and the questions."""
    import skimage.data
    from PIL import Image

    from megavlm.demo.model_folder import make_model_folder

    names = ("astronaut", "chelsea", "coffee", "rocket")
    for name in names:
        picture = Image.fromarray(getattr(skimage.data, name)()).convert("RGB")
        picture.resize((SIDE, SIDE)).save(root / f"{name}.png")
    questions = [
        {
            "messages": [{"role": "user", "content": f"<image>What is on picture {number}?"}],
            "images": [f"{names[number % 4]}.png"],
        }
        for number in range(prompts)
    ]
    return make_model_folder(root / "model", text=TEXT, vision=VISION, max_pixels=SIDE * SIDE), questions


def ours(folder: Path, root: Path, questions: list[dict]) -> dict:
    """Seconds of the engine, and how they are divided."""
    from megavlm.config.settings import Settings
    from megavlm.data.renderer import Renderer
    from megavlm.media.files import in_folder
    from megavlm.rollout.answerer import vision_tokens
    from megavlm.rollout.builtin import BuiltinEngine
    from megavlm.rollout.engine import Prompt, Sampling
    from megavlm.runtime.session import start

    settings = Settings(model={"hf": folder, "load": folder}, train={"precision": "fp32"})
    session, renderer = start(settings, training=False), Renderer(folder, settings.data)
    samples = [
        renderer.encode(question, in_folder(root), "question", kind="prompt", index=index)
        for index, question in enumerate(questions)
    ]
    seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def timer(part: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        seconds[part] += time.perf_counter() - begin

    engine = BuiltinEngine(
        session.vlm, places=len(samples) * ANSWERS, cache_gib=8.0, cache_setting="cache_gib", prompt_tokens=2048,
        chunk_tokens=1024, timer=timer,
    )  # fmt: skip
    sampling = Sampling(TOKENS, temperature=1.0, banned=vision_tokens(session.shapes))
    prompts = [Prompt(one, tuple(range(one.index * ANSWERS, (one.index + 1) * ANSWERS))) for one in samples]
    list(engine.generate(iter(prompts[:1]), Sampling(2)))  # a warm-up
    seconds.clear()
    begin = time.perf_counter()
    answered = list(engine.generate(iter(prompts), sampling))
    total = time.perf_counter() - begin
    tokens = sum(len(answer.tokens) for one in answered for answer in one.answers)
    weights = sum(p.numel() for chunk in session.vlm.language for p in chunk.parameters())
    return {
        "weights_of_decoder": weights, "prompt_tokens": len(samples[0].input_ids), "tokens": tokens, "seconds": total,
        "seconds_of": {**seconds, "other": total - sum(seconds.values())},
    }  # fmt: skip


def theirs(folder: Path, root: Path, questions: list[dict]) -> dict:
    """Seconds of transformers' ``generate``."""
    import torch
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    processor = AutoProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = "left"
    banned = [processor.tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in BANNED]

    def inputs(some: list[dict]) -> dict:
        texts = [
            processor.apply_chat_template(
                [{"role": "user", "content": [
                    {"type": "image"}, {"type": "text", "text": question["messages"][0]["content"][len("<image>"):]},
                ]}], tokenize=False, add_generation_prompt=True,
            )
            for question in some
        ]  # fmt: skip
        pictures = [Image.open(root / question["images"][0]) for question in some]
        return processor(text=texts, images=pictures, padding=True, return_tensors="pt")

    def generate(some: list[dict], tokens: int) -> int:
        out = model.generate(
            **inputs(some), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=True, temperature=1.0, top_k=0,
            top_p=1.0, num_return_sequences=ANSWERS, suppress_tokens=banned,
        )  # fmt: skip
        return out.shape[0] * tokens

    with torch.no_grad():
        generate(questions[:1], 2)  # a warm-up
        begin = time.perf_counter()
        tokens = generate(questions, TOKENS)
    return {"tokens": tokens, "seconds": time.perf_counter() - begin}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="number of questions")
    parser.add_argument("--json", help="also write the results to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="megavlm-generate-") as temporary:
        root = Path(temporary)
        folder, questions = make(root, args.prompts)
        results = {"megavlm": ours(folder, root, questions), "transformers": theirs(folder, root, questions)}
    for result in results.values():
        result["tokens_per_second"] = result["tokens"] / result["seconds"]
    ratio = results["megavlm"]["tokens_per_second"] / results["transformers"]["tokens_per_second"]
    for name, result in results.items():
        speed, took = result["tokens_per_second"], result["seconds"]
        print(f"{name}: {result['tokens']} tokens in {took:.1f} s, {speed:.1f} tokens per second")
    parts = results["megavlm"]["seconds_of"]
    print("of these seconds: " + ", ".join(f"{part} {value:.1f}" for part, value in parts.items()))
    print(f"{ratio:.2f} times as many tokens per second (at least {MIN_RATIO})")
    if args.json:
        content = {
            "versions": versions(), "prompts": args.prompts, "answers": ANSWERS, "tokens_of_an_answer": TOKENS,
            **results, "ratio": ratio,
        }  # fmt: skip
        Path(args.json).write_text(json.dumps(content, indent=1) + "\n")
    return 0 if ratio >= MIN_RATIO else 1


if __name__ == "__main__":
    sys.exit(main())
