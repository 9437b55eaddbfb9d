"""What the names and shapes of a model's weights say about it, in the terms of config.json."""

import math
import re
from collections.abc import Mapping

from megavlm.convert.tensor_order import Shape

LAYERS, DEPTH = "text_config.num_hidden_layers", "vision_config.depth"
LEVELS = "number of vision_config.deepstack_visual_indexes"
# The tensors of an adapter, by the ends of their names in a checkpoint and in peft's files: the axis with a size.
_IN_ADAPTERS = {
    r"language_model\.layers\.\d+\.self_attn\.[qkv]_proj\.lora_A\.weight": ("text_config.hidden_size", 1),
    r"language_model\.layers\.\d+\.self_attn\.o_proj\.lora_B\.weight": ("text_config.hidden_size", 0),
    r"language_model\.layers\.\d+\.mlp\.down_proj\.lora_A\.weight": ("text_config.intermediate_size", 1),
    r"visual\.blocks\.\d+\.attn\.(?:qkv|proj)\.lora_A\.weight": ("vision_config.hidden_size", 1),
    r"visual\.blocks\.\d+\.mlp\.linear_fc2\.lora_A\.weight": ("vision_config.intermediate_size", 1),
}


def of_weights(tensors: Mapping[str, Shape]) -> dict[str, object]:
    """The fields of config.json that follow from the keys and shapes of a checkpoint; fewer if tensors are missing."""
    found: dict[str, object] = {}

    def note(field: str, key: str, axis: int, per: float | None = 1) -> None:
        shape = tensors.get(key, ())
        if axis < len(shape) and per:
            found[field] = round(shape[axis] / per)

    decoder, tower = "language.decoder.layers", "vision.layers"
    found[LAYERS], found[DEPTH] = _count(decoder, tensors), _count(tower, tensors)
    found[LEVELS] = _count("projector.deepstack", tensors)
    found["tie_word_embeddings"] = "language.output_layer.weight" not in tensors
    embedding = "language.embedding.word_embeddings.weight"
    note("text_config.vocab_size", embedding, 0)
    note("text_config.hidden_size", embedding, 1)

    attention = f"{decoder}.0.self_attention"
    note("text_config.head_dim", f"{attention}.q_layernorm.weight", 0)
    head_dim, queries, rows = (
        _size(tensors, f"{attention}.{key}", axis)
        for key, axis in (("q_layernorm.weight", 0), ("linear_proj.weight", 1), ("linear_qkv.weight", 0))
    )
    if head_dim and queries and rows:
        found["text_config.num_attention_heads"] = queries // head_dim
        found["text_config.num_key_value_heads"] = (rows - queries) // (2 * head_dim)
    found["text_config.attention_bias"] = f"{attention}.linear_qkv.bias" in tensors

    dense = _layers_with(r"mlp\.linear_fc1\.weight", tensors)
    experts = _layers_with(r"mlp\.experts\.experts\.linear_fc1\.weight", tensors)
    found["model_type"] = "qwen3_vl_moe" if experts else "qwen3_vl"
    if dense:
        note("text_config.intermediate_size", f"{decoder}.{dense[0]}.mlp.linear_fc1.weight", 0, 2)
    if experts:
        found["text_config.mlp_only_layers"] = dense
        note("text_config.num_experts", f"{decoder}.{experts[0]}.mlp.experts.experts.linear_fc1.weight", 0)
        note("text_config.moe_intermediate_size", f"{decoder}.{experts[0]}.mlp.experts.experts.linear_fc1.weight", 1, 2)

    note("vision_config.hidden_size", "vision.patch_embed.bias", 0)
    note("vision_config.in_channels × temporal_patch_size × patch_size²", "vision.patch_embed.weight", 1)
    note("vision_config.num_position_embeddings", "vision.position_embedding.weight", 0)
    note("vision_config.intermediate_size", f"{tower}.0.mlp.linear_fc1.weight", 0)
    note("vision_config.out_hidden_size", "projector.merger.linear_fc2.weight", 0)
    hidden = _size(tensors, "vision.patch_embed.bias", 0)
    joined = _size(tensors, "projector.merger.linear_fc1.weight", 1)
    if hidden and joined:
        found["vision_config.spatial_merge_size"] = math.isqrt(joined // hidden)
    return found


def of_adapter(tensors: Mapping[str, Shape]) -> dict[str, object]:
    """The fields of config.json that follow from the names and shapes of an adapter's tensors."""
    found: dict[str, object] = {}
    for field, pattern in (
        (LAYERS, r"language_model\.layers"),
        (DEPTH, r"visual\.blocks"),
        (LEVELS, r"visual\.deepstack_merger_list"),
    ):
        if count := _count(rf".*{pattern}", tensors):
            found[field] = count
    for name, shape in tensors.items():
        for pattern, (field, axis) in _IN_ADAPTERS.items():
            if re.search(rf"{pattern}$", name) and len(shape) == 2:
                found.setdefault(field, shape[axis])
    return found


def differences(what: str, there: dict[str, object], here: dict[str, object]) -> str:
    """The fields that two models have both, with different values: "FIELD is A in WHAT and B in config.json; …"."""
    return "; ".join(
        f"{field} is {_written(value)} in {what} and {_written(here[field])} in config.json"
        for field, value in there.items()
        if field in here and here[field] != value
    )


def _written(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _size(tensors: Mapping[str, Shape], key: str, axis: int) -> int:
    shape = tensors.get(key, ())
    return shape[axis] if axis < len(shape) else 0


def _count(pattern: str, tensors: Mapping[str, Shape]) -> int:
    """One more than the largest number that follows ``pattern`` in a name."""
    matches = (re.match(rf"{pattern}\.(\d+)\.", name) for name in tensors)
    return 1 + max((int(match[1]) for match in matches if match), default=-1)


def _layers_with(end: str, tensors: Mapping[str, Shape]) -> list[int]:
    matches = (re.fullmatch(rf"language\.decoder\.layers\.(\d+)\.{end}", name) for name in tensors)
    return sorted(int(match[1]) for match in matches if match)
