"""The table of names: the tensors of Hugging Face's Qwen3-VL and Qwen3-VL-MoE, and Megatron's checkpoint keys.

Each entry pairs one Megatron tensor with the HF tensors that hold the same values. Both converters, the comparison and
the error messages use this table; no other module contains the name of an HF weight.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from megavlm.convert.tensor_order import Experts, FusedQkv, GroupedQkv, Layout, Same, Shape, Stacked
from megavlm.model.shapes import Shapes, TextShape

HF_EMBEDDING = "model.language_model.embed_tokens.weight"
HF_OUTPUT = "lm_head.weight"
MCORE_EMBEDDING = "language.embedding.word_embeddings.weight"
MCORE_OUTPUT = "language.output_layer.weight"


@dataclass(frozen=True)
class Entry:
    """One Megatron tensor and its HF counterparts.

    Attributes:
        key: name in the Megatron checkpoint.
        shape: global shape in the checkpoint; the first axis of stacked experts is the expert.
        hf: HF names with their shapes, in the order that the layout expects.
        layout: conversion between the two orders of the values.
        pieces: number of parts along axis 0 that can be converted separately: the experts of a layer, or 1.
        padded: whether the stored tensor may have more rows than ``shape``, because the vocabulary was padded.
        copies: HF names under which some folders have a second copy of ``hf``: the output layer of a tied model. A copy
            that differs is a weight of its own (``megavlm.convert.hf_shapes``).
    """

    key: str
    shape: Shape
    hf: dict[str, Shape]
    layout: Layout = field(default_factory=Same)
    pieces: int = 1
    padded: bool = False
    copies: tuple[str, ...] = ()

    def accepts(self, name: str, shape: Shape) -> bool:
        """Whether the HF tensor ``name`` may have ``shape``: the shape in the table or, for experts, its transpose."""
        expected = self.hf.get(name, self.shape)
        turned = (*expected[:-2], *expected[:-3:-1])
        return tuple(shape) == expected or (isinstance(self.layout, Experts) and tuple(shape) == turned)


def table(shapes: Shapes) -> list[Entry]:
    """All weights of the model, in the order of the layers: vision, projector, language."""
    return [*_vision(shapes), *_projector(shapes), *_language(shapes)]


def _linear(key: str, hf: str, out: int, inner: int, layout: Layout | None = None, *, bias: bool) -> Iterator[Entry]:
    """The weight [out, inner] and the bias [out] of a linear layer."""
    layout = layout or Same()
    yield Entry(f"{key}.weight", (out, inner), {f"{hf}.weight": (out, inner)}, layout)
    if bias:
        yield Entry(f"{key}.bias", (out,), {f"{hf}.bias": (out,)}, layout)


def _norm(key: str, hf: str, width: int, *, bias: bool = True) -> Iterator[Entry]:
    """The weight and the bias of a norm. "weight" and "bias" are appended to ``key``: "….norm." or "….layer_norm_"."""
    for part in ("weight", "bias") if bias else ("weight",):
        yield Entry(f"{key}{part}", (width,), {f"{hf}.{part}": (width,)})


def _vision(shapes: Shapes) -> Iterator[Entry]:
    v = shapes.vision
    hf = "model.visual"
    conv = (v.hidden, v.in_channels, v.temporal_patch_size, v.patch_size, v.patch_size)
    yield Entry("vision.patch_embed.weight", (v.hidden, v.patch_dim), {f"{hf}.patch_embed.proj.weight": conv})
    yield Entry("vision.patch_embed.bias", (v.hidden,), {f"{hf}.patch_embed.proj.bias": (v.hidden,)})
    grid = (v.num_positions, v.hidden)
    yield Entry("vision.position_embedding.weight", grid, {f"{hf}.pos_embed.weight": grid})
    for i in range(v.layers):
        key, block = f"vision.layers.{i}", f"{hf}.blocks.{i}"
        yield from _norm(f"{key}.self_attention.linear_qkv.layer_norm_", f"{block}.norm1", v.hidden)
        qkv = FusedQkv(v.heads)
        yield from _linear(
            f"{key}.self_attention.linear_qkv", f"{block}.attn.qkv", 3 * v.hidden, v.hidden, qkv, bias=True
        )
        yield from _linear(f"{key}.self_attention.linear_proj", f"{block}.attn.proj", v.hidden, v.hidden, bias=True)
        yield from _norm(f"{key}.mlp.linear_fc1.layer_norm_", f"{block}.norm2", v.hidden)
        yield from _linear(f"{key}.mlp.linear_fc1", f"{block}.mlp.linear_fc1", v.ffn, v.hidden, bias=True)
        yield from _linear(f"{key}.mlp.linear_fc2", f"{block}.mlp.linear_fc2", v.hidden, v.ffn, bias=True)


def _projector(shapes: Shapes) -> Iterator[Entry]:
    v = shapes.vision
    # The main merger normalises each patch before they are joined, the deepstack mergers normalise the joined patches.
    mergers = [("projector.merger", "model.visual.merger", v.hidden)]
    for k in range(len(v.deepstack_layers)):
        mergers.append((f"projector.deepstack.{k}", f"model.visual.deepstack_merger_list.{k}", v.merged_hidden))
    for key, hf, norm_width in mergers:
        yield from _norm(f"{key}.norm.", f"{hf}.norm", norm_width)
        yield from _linear(f"{key}.linear_fc1", f"{hf}.linear_fc1", v.merged_hidden, v.merged_hidden, bias=True)
        yield from _linear(f"{key}.linear_fc2", f"{hf}.linear_fc2", v.out_hidden, v.merged_hidden, bias=True)


def _language(shapes: Shapes) -> Iterator[Entry]:
    t = shapes.text
    vocabulary = (t.vocab, t.hidden)
    yield Entry(
        MCORE_EMBEDDING,
        vocabulary,
        {HF_EMBEDDING: vocabulary},
        padded=True,
        copies=(HF_OUTPUT,) if shapes.tied else (),
    )
    for i in range(t.layers):
        yield from _attention(t, f"language.decoder.layers.{i}", f"model.language_model.layers.{i}")
        mlp = _moe if t.is_moe_layer(i) else _dense
        yield from mlp(t, f"language.decoder.layers.{i}", f"model.language_model.layers.{i}")
    yield from _norm("language.decoder.final_layernorm.", "model.language_model.norm", t.hidden, bias=False)
    if not shapes.tied:
        yield Entry(MCORE_OUTPUT, vocabulary, {HF_OUTPUT: vocabulary}, padded=True)


def _attention(t: TextShape, key: str, hf: str) -> Iterator[Entry]:
    key, q, kv = f"{key}.self_attention", t.heads * t.head_dim, t.kv_heads * t.head_dim
    yield from _norm(f"{key}.linear_qkv.layer_norm_", f"{hf}.input_layernorm", t.hidden, bias=False)
    for part, inner in {"weight": (t.hidden,), "bias": ()}.items():
        if part == "weight" or t.attention_bias:
            yield Entry(
                f"{key}.linear_qkv.{part}",
                (q + 2 * kv, *inner),
                {f"{hf}.self_attn.{n}_proj.{part}": (rows, *inner) for n, rows in (("q", q), ("k", kv), ("v", kv))},
                GroupedQkv(t.kv_heads),
            )
    yield from _norm(f"{key}.q_layernorm.", f"{hf}.self_attn.q_norm", t.head_dim, bias=False)
    yield from _norm(f"{key}.k_layernorm.", f"{hf}.self_attn.k_norm", t.head_dim, bias=False)
    yield from _linear(f"{key}.linear_proj", f"{hf}.self_attn.o_proj", t.hidden, q, bias=t.attention_bias)


def _dense(t: TextShape, key: str, hf: str) -> Iterator[Entry]:
    half = (t.ffn, t.hidden)
    yield from _norm(f"{key}.mlp.linear_fc1.layer_norm_", f"{hf}.post_attention_layernorm", t.hidden, bias=False)
    yield Entry(
        f"{key}.mlp.linear_fc1.weight",
        (2 * t.ffn, t.hidden),
        {f"{hf}.mlp.gate_proj.weight": half, f"{hf}.mlp.up_proj.weight": half},
        Stacked(),
    )
    down = (t.hidden, t.ffn)
    yield Entry(f"{key}.mlp.linear_fc2.weight", down, {f"{hf}.mlp.down_proj.weight": down})


def _moe(t: TextShape, key: str, hf: str) -> Iterator[Entry]:
    assert t.moe is not None
    num, up, down = t.moe.num_experts, (2 * t.moe.ffn, t.hidden), (t.hidden, t.moe.ffn)
    yield from _norm(f"{key}.pre_mlp_layernorm.", f"{hf}.post_attention_layernorm", t.hidden, bias=False)
    router = (num, t.hidden)
    yield Entry(f"{key}.mlp.router.weight", router, {f"{hf}.mlp.gate.weight": router})
    for fc, name, matrix in (("linear_fc1", "gate_up_proj", up), ("linear_fc2", "down_proj", down)):
        yield Entry(
            f"{key}.mlp.experts.experts.{fc}.weight",
            (num, *matrix),
            {f"{hf}.mlp.experts.{name}": (num, *matrix)},
            Experts(),
            pieces=num,
        )
