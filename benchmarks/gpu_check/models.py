"""Folders, rows and models of the checks: random weights made on the spot, real pictures, nothing downloaded."""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
# Of the sizes of released models that configs/models has; a check may take fewer layers.
SHAPES = {name: ROOT / "configs" / "models" / name / "config.json" for name in ("2b", "8b")}
PICTURES = ("astronaut", "coffee", "rocket", "chelsea", "brick", "grass", "page", "gravel")
SENTENCE = "The rocket stands on its pad, and everybody waits for the countdown to end. "


@dataclass(frozen=True)
class Size:
    """How large a check is: on a GPU as it is meant, on a CPU just large enough to run its code.

    Attributes:
        rows, seq_length: rows of a step, and tokens of a row.
        repeats, warm_up: how often a step is timed, and how often it runs before.
        text, vision: sizes of the model.
        longest: to how many pixels the longer edge of a picture is reduced; None: pictures as they are.
    """

    rows: int
    seq_length: int
    repeats: int
    text: dict[str, Any]
    vision: dict[str, Any]
    longest: int | None = None
    warm_up: int = 2


def shaped_folder(out: Path, size: Size, *, like: str | None = None) -> Path:
    """A model folder without weights: tokenizer and processor of the toy, sizes of a released model (``like``).

    The entries of ``size`` replace single sizes.
    """
    from megavlm.demo.model_folder import make_model_folder

    make_model_folder(out, max_pixels=1024 * 1024)
    (out / "model.safetensors").unlink()
    config = json.loads((out / "config.json").read_text())
    released = json.loads(SHAPES[like].read_text()) if like else {}
    for section, own in (("text_config", size.text), ("vision_config", size.vision)):
        sizes = {k: v for k, v in released.get(section, {}).items() if isinstance(v, int | float | list)}
        sizes = {k: v for k, v in sizes.items() if not k.endswith("token_id")}
        config[section] |= sizes | own
    if like and "head_dim" not in size.text:  # the sections of the rotary angles belong to the head dimension
        text = released["text_config"]
        config["text_config"]["rope_parameters"] = text["rope_scaling"] | {"rope_theta": text["rope_theta"]}
    config["vision_config"]["out_hidden_size"] = config["text_config"]["hidden_size"]
    (out / "config.json").write_text(json.dumps(config, indent=1))
    return out


def save_pictures(root: Path, size: Size) -> str:
    """Writes eight photographs of scikit-image as JPEG, or noise of such sizes; returns which of both."""
    from PIL import Image

    root.mkdir(parents=True, exist_ok=True)
    try:
        from skimage import data
    except ImportError:
        data = None
    draw = np.random.default_rng(0)
    for name in PICTURES:
        if data is not None:
            pixels = getattr(data, name)()
        else:
            pixels = draw.integers(0, 256, (512, 512, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels).convert("RGB")
        if size.longest is not None:
            picture.thumbnail((size.longest, size.longest))
        picture.save(root / f"{name}.jpg")
    return "photographs of scikit-image" if data is not None else "noise, because scikit-image is not installed"


def document(renderer: Any, root: Path, tokens: int, share: float, number: int) -> Any:
    """A rendered document of just under ``tokens`` tokens, about ``share`` of them visual (``Sample``)."""
    from megavlm.media.files import in_folder

    encode = lambda text, images: renderer.encode(
        {"text": text, "images": images}, in_folder(root), f"document {number}", kind="pretrain", index=number
    )
    each = len(renderer.tokenizer(3 * SENTENCE).input_ids) - len(renderer.tokenizer(2 * SENTENCE).input_ids)
    sizes = [len(encode("<image>", [f"{name}.jpg"]).input_ids) if share else 0 for name in PICTURES]
    images, visual = [], 0
    for place in itertools.cycle(range(number, number + len(PICTURES))):
        if not share or visual + min(sizes) > share * tokens:
            break
        if visual + (more := sizes[place % len(PICTURES)]) <= share * tokens:
            images.append(f"{PICTURES[place % len(PICTURES)]}.jpg")
            visual += more
    sentences = (tokens - visual - 8 - len(images)) // each
    pieces = np.array_split(np.arange(sentences), max(len(images), 1))
    marks = ["<image>" if images else ""] * len(pieces)
    return encode("".join(mark + SENTENCE * len(piece) for mark, piece in zip(marks, pieces, strict=True)), images)


def hf_inputs(sample: Any, where: Any) -> dict[str, Any]:
    """The arguments of transformers' model for a rendered sample, with the positions that it would compute itself."""
    import numpy as np
    import torch

    from megavlm.runtime.pixels import normalised

    inputs = {
        "input_ids": sample.input_ids[None],
        "position_ids": sample.position_ids[:, None],
        "mm_token_type_ids": torch.zeros_like(sample.input_ids[None]),
    }
    if len(sample.frame_grids):
        grids = torch.as_tensor(sample.frame_grids, dtype=torch.int64)
        lengths = np.asarray(sample.frame_grids, dtype=np.int64).prod(axis=1)
        images = np.asarray(sample.frame_images, dtype=np.int64)
        inputs["pixel_values"] = normalised(sample.pixels, lengths, images, sample.pixel_scale, 2, torch.float32)
        inputs["image_grid_thw"] = torch.cat([torch.ones(len(grids), 1, dtype=torch.int64), grids], dim=1)
        inputs["mm_token_type_ids"][0, sample.visual_positions] = 1
    return {name: value.to(where) for name, value in inputs.items()}


def hf_loss(model: Any, inputs: dict[str, Any], labels: Any, count: float) -> Any:
    """The sum of the cross-entropy over the targets of a sample, divided by ``count``; and their log-probabilities."""
    import torch

    logits = model(**inputs, use_cache=False).logits[0]
    at = labels >= 0
    logprobs = -torch.nn.functional.cross_entropy(logits[at].float(), labels[at], reduction="none")
    return -logprobs.sum() / count, logprobs.detach()


def part_of(name: str) -> str:
    """The part of the model that a weight of transformers' model belongs to."""
    if "visual" not in name:
        return "language"
    return "projector" if "merger" in name else "vision"
