"""Toy models and samples on which every part of a Qwen3-VL matters, and the reference that they are compared with.

Initialisation as released (std 0.02, norms 1, biases 0) would make a toy almost linear in nothing: deepstack, positions
or q/k norms could be lost without a trace. Here weights are large, norms and biases random.
"""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from skimage import data as photographs

from megavlm.demo.model_folder import make_model_folder

TEXT = {"initializer_range": 0.12, "num_hidden_layers": 4}
VISION = {"initializer_range": 0.12, "depth": 4, "deepstack_visual_indexes": [0, 1, 2], "num_position_embeddings": 64}


def toy_folder(root: Path, *, moe: bool = False, tied: bool = True) -> Path:
    """A toy model's folder under ``root``, made at the first call."""
    folder = root / f"toy-{'moe' if moe else 'dense'}-{'tied' if tied else 'untied'}"
    if not folder.exists():
        make_model_folder(folder, text=TEXT, vision=VISION, moe=moe, tied=tied, norm_noise=0.3, seed=7)
    return folder


def picture(root: Path, name: str, size: tuple[int, int]) -> str:
    path = root / f"{name}-{size[0]}x{size[1]}.png"
    if not path.exists():
        Image.fromarray(getattr(photographs, name)()).convert("RGB").resize(size).save(path)
    return path.name


def toy_records(root: Path) -> list[dict]:
    """Eight conversations: one picture, several of different sizes, a video, text only."""
    root.mkdir(parents=True, exist_ok=True)
    still = lambda name, *size: picture(root, name, size)
    frames = [still("astronaut", 96, 64)] * 2 + [still("chelsea", 96, 64)] * 2
    say = lambda role, content: {"role": role, "content": content}
    return [
        {
            "messages": [say("user", "<image>What is this?"), say("assistant", "A cat, looking at you.")],
            "images": [still("chelsea", 96, 64)],
        },
        {
            "messages": [
                say("system", "Answer briefly."),
                say("user", "Compare <image> with <image> and <image>."),
                say("assistant", "A cup, a rocket, and an astronaut."),
            ],
            "images": [still("coffee", 128, 96), still("rocket", 64, 160), still("astronaut", 32, 32)],
        },
        {
            "messages": [say("user", "<video>What happens?"), say("assistant", "She becomes a cat.")],
            "videos": [{"frames": frames, "fps": 2.0}],
        },
        {"messages": [say("user", "Two and two?"), say("assistant", "Four.")]},
        {
            "messages": [
                say("user", "<image>Who?"),
                say("assistant", "An astronaut."),
                say("user", "And here? <image>"),
                say("assistant", "Coffee, of course: a cup of it."),
            ],
            "images": [still("astronaut", 160, 160), still("coffee", 64, 64)],
        },
        {"messages": [say("user", "Name a colour, please."), say("assistant", "Blue, like the sky — ça va?")]},
        {
            "messages": [say("user", "Read: <image>"), say("assistant", "Region-based segmentation.")],
            "images": [still("page", 384, 192)],
        },
        {
            "messages": [say("user", "<image><image>Same?"), say("assistant", "No.")],
            "images": [still("rocket", 64, 32), still("chelsea", 32, 96)],
        },
    ]


def write_records(file: Path, records: list[dict]) -> Path:
    file.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return file


def reference_model(folder: Path):
    """transformers' own model in float32, eager attention."""
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def reference_inputs(processor, record: dict, root: Path, *, add_generation_prompt: bool = False) -> dict:
    """What transformers' processor makes of a record: the arguments of the model's forward."""
    parts = []
    images, videos = iter(record.get("images", [])), iter(record.get("videos", []))
    pictures, clips = [], []
    for message in record["messages"]:
        content = []
        for piece in _split(message["content"]):
            if piece == "<image>":
                pictures.append(Image.open(root / next(images)).convert("RGB"))
                content.append({"type": "image"})
            elif piece == "<video>":
                clips.append(next(videos))
                content.append({"type": "video"})
            else:
                content.append({"type": "text", "text": piece})
        parts.append({"role": message["role"], "content": content})
    text = processor.apply_chat_template(parts, tokenize=False, add_generation_prompt=add_generation_prompt)
    arguments = {}
    if clips:
        frames = [np.stack([np.array(Image.open(root / f).convert("RGB")) for f in clip["frames"]]) for clip in clips]
        metadata = [
            {"total_num_frames": len(f), "fps": clip["fps"], "frames_indices": list(range(len(f)))}
            for f, clip in zip(frames, clips, strict=True)
        ]
        arguments = {"videos": frames, "video_metadata": metadata, "do_sample_frames": False}
    return dict(processor(text=[text], images=pictures or None, return_tensors="pt", **arguments))


def read_samples(path, renderer, kind: str) -> list:
    """All samples of a file, rendered, in its order."""
    from megavlm.sources.blend import open_file

    file = open_file(path)
    records = [(index, *file.read(index)) for index in range(len(file))]
    return [renderer.encode(r, find, file.source(i), kind=kind, index=i) for i, r, find in records]


def _split(content: str) -> list[str]:
    import re

    return [piece for piece in re.split(r"(<image>|<video>)", content) if piece]
