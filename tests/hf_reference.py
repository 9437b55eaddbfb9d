"""Rendering as the Hugging Face processor does it when called with a record's messages: what ours is compared with."""

import re
import unicodedata
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel
from transformers.video_utils import VideoMetadata, load_video

# As the Thinking models' own: the prompt opens the thought, and only what follows the latest question keeps it.
THINKING = r"""
{%- macro body(content) -%}
  {%- if content is string -%}{{- content -}}
  {%- else -%}
    {%- for part in content or [] -%}
      {%- if part.type == 'text' -%}{{- part.text -}}
      {%- else -%}{{- '<|vision_start|><|' + part.type + '_pad|><|vision_end|>' -}}{%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- set latest = namespace(question=-1) -%}
{%- for message in messages -%}
  {%- if message.role == 'user' -%}{%- set latest.question = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- if tools -%}
  {{- '<|im_start|>system\n' -}}
  {%- if messages[0].role == 'system' -%}{{- body(messages[0].content) + '\n\n' -}}{%- endif -%}
  {{- '# Tools\n' -}}{%- for tool in tools -%}{{- tool | tojson + '\n' -}}{%- endfor -%}{{- '<|im_end|>\n' -}}
{%- endif -%}
{%- for message in messages -%}
  {%- if message.role == 'assistant' -%}
    {{- '<|im_start|>assistant\n' -}}
    {%- set thought, _, answer = body(message.content).rpartition('</think>') -%}
    {%- set thought = message.reasoning_content or thought.strip().removeprefix('<think>') -%}
    {%- if loop.index0 > latest.question and (loop.last or thought) -%}
      {{- '<think>\n' + thought.strip() + '\n</think>\n\n' -}}
    {%- endif -%}
    {{- answer.strip() -}}
    {%- for call in message.tool_calls or [] -%}
      {{- '\n' if answer.strip() or not loop.first -}}{{- '<tool_call>\n' + call | tojson + '\n</tool_call>' -}}
    {%- endfor -%}
    {{- '<|im_end|>\n' -}}
  {%- elif message.role == 'tool' -%}
    {%- if not loop.previtem or loop.previtem.role != 'tool' -%}{{- '<|im_start|>user' -}}{%- endif -%}
    {{- '\n<tool_response>\n' + body(message.content) + '\n</tool_response>' -}}
    {%- if not loop.nextitem or loop.nextitem.role != 'tool' -%}{{- '<|im_end|>\n' -}}{%- endif -%}
  {%- elif message.role == 'user' or not (tools and loop.first) -%}
    {{- '<|im_start|>' + message.role + '\n' + body(message.content) + '<|im_end|>\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n<think>\n' -}}{%- endif -%}
"""


def talk(*contents, system=None):
    """Messages in turn from user and assistant."""
    turns = [{"role": "assistant" if n % 2 else "user", "content": content} for n, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *turns] if system is not None else turns


def reference(processor, record, base: Path, prompt=False):
    """What the processor makes of the record. Videos are handed over whole with their rate; it samples them itself."""
    pictures, images, messages = iter(record.get("images", ())), [], []
    for message in record["messages"]:
        message = {name: value for name, value in message.items() if name not in ("loss", "weight")}
        content = message.get("content")
        if isinstance(content, str) and re.search("<image>|<video>", content):
            pieces = filter(None, re.split("(<image>|<video>)", content))
            content = [
                {"type": piece[1:-1]} if piece in ("<image>", "<video>") else {"type": "text", "text": piece}
                for piece in pieces
            ]
        for part in content if isinstance(content, list) else ():
            if part["type"] == "image":
                images.append(_picture(base / (part.get("image") or next(pictures))))
        messages.append(message | {"content": content})
    videos = [_video(named, base, processor.video_processor.fps) for named in record.get("videos", ())]
    text = processor.apply_chat_template(messages, tools=record.get("tools"), add_generation_prompt=prompt)
    return processor(
        text=[text],
        images=images or None,
        videos=[frames for frames, _ in videos] or None,
        video_metadata=[about for _, about in videos] or None,
        return_tensors="pt",
    )


def written(processor, record) -> str:
    """The conversation as the template writes it, without what stands for pictures and videos.

    Each text between those is composed (Unicode's NFC), as the tokenizer does it.
    """
    messages = []
    for message in record["messages"]:
        content = message.get("content")
        if isinstance(content, str):
            pieces = filter(None, re.split("(<image>|<video>)", content))
            content = [
                {"type": piece[1:-1]} if piece in ("<image>", "<video>") else {"type": "text", "text": piece}
                for piece in pieces
            ]
        messages.append(message | {"content": content})
    text = processor.apply_chat_template(messages, tools=record.get("tools"))
    pieces = re.split(r"<\|vision_start\|><\|(?:image|video)_pad\|><\|vision_end\|>", text)
    return "".join(unicodedata.normalize("NFC", piece) for piece in pieces)


def _picture(path: Path) -> str | Image.Image:
    """An opaque PNG's path, which the processor decodes itself; other pictures as opened by PIL.

    So two decoders are compared: we leave JPEG to torchvision, and the rest to PIL. Only what PIL has opened does the
    processor paint on white where it is transparent.
    """
    with Image.open(path) as picture:
        if picture.format == "PNG" and not picture.getexif() and not picture.has_transparency_data:
            return str(path)
        return ImageOps.exif_transpose(picture)


def _video(named, base: Path, fps: float):
    """All frames, and what is known of them; frames without a rate were sampled at the processor's."""
    if isinstance(named, dict):
        named, fps = named["frames"], named.get("fps", fps)
    if isinstance(named, list):
        pictures = [ImageOps.exif_transpose(Image.open(base / name)).convert("RGB") for name in named]
        return np.stack(pictures), VideoMetadata(total_num_frames=len(named), fps=fps)
    # The header of a WebM file has no count, so the number asked for is beyond every file's.
    frames, about = load_video(str(base / named), sample_indices_fn=lambda metadata: np.arange(1000))
    about.total_num_frames = len(frames)
    return frames, about


def patches_of(sample) -> torch.Tensor:
    """The patches of a sample (or row) as transformers returns them, from its bytes: float32 [P, 2 * channels * n]."""
    done, start = [torch.empty(0, 1536)], 0
    for length, images in zip(sample.frame_grids.prod(1).tolist(), sample.frame_images.tolist(), strict=True):
        frame = sample.pixels[start : start + length * images].view(images, length, 3, -1)
        done.append(torch.stack([frame[0], frame[images - 1]], dim=2).reshape(length, -1).float().sub(127.5).div(127.5))
        start += length * images
    assert start == len(sample.pixels)
    return torch.cat(done)


def assert_equal(sample, expected) -> None:
    """A sample has the processor's very tokens and pixel rows, and transformers' positions."""
    torch.testing.assert_close(sample.input_ids, expected["input_ids"][0])

    # Pixel rows in text order: the next picture or video each time one begins.
    types = expected["mm_token_type_ids"][0]
    image_grid, video_grid = expected.get("image_grid_thw"), expected.get("video_grid_thw")
    queues = {
        1: iter([] if image_grid is None else expected["pixel_values"].split(image_grid.prod(1).tolist())),
        2: iter([] if video_grid is None else expected["pixel_values_videos"].split(
            [h * w for t, h, w in video_grid.tolist() for _ in range(t)])),
    }  # fmt: skip
    begins = torch.cat([types[:1], torch.where(types[1:] != types[:-1], types[1:], 0)])
    rows = [next(queues[kind]) for kind in begins[begins > 0].tolist()]
    assert [next(queue, None) for queue in queues.values()] == [None, None]
    torch.testing.assert_close(patches_of(sample), torch.cat(rows) if rows else torch.empty(0, 1536), rtol=0, atol=0)
    assert sample.frame_grids.prod(1).tolist() == [len(block) for block in rows]
    torch.testing.assert_close(sample.visual_positions, torch.nonzero(types)[:, 0])

    with torch.device("meta"):
        model = Qwen3VLModel(Qwen3VLConfig(vision_config={"depth": 1}, text_config={"num_hidden_layers": 1}))
    positions, _ = model.get_rope_index(
        expected["input_ids"], expected["mm_token_type_ids"], image_grid_thw=image_grid, video_grid_thw=video_grid
    )
    torch.testing.assert_close(sample.position_ids, positions[:, 0])
    assert sample.num_images == (0 if image_grid is None else len(image_grid))
    assert sample.num_videos == (0 if video_grid is None else len(video_grid))
