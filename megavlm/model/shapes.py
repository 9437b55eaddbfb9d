"""The shapes of a Qwen3-VL model, read from the config.json of a Hugging Face folder.

All sizes of a model that the package needs are here, and no other module reads them from config.json. The fields mean
what they mean in transformers' ``qwen3_vl`` and ``qwen3_vl_moe`` configurations. A field that transformers reads is
used, or every value but one is refused (``_ONLY``), or it does not matter here (tests/model/test_config_fields.py says
why).
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megavlm.base.errors import UserError
from megavlm.base.json_files import parse_json
from megavlm.base.quoting import quoted, shortened
from megavlm.model.rope_scaling import RopeScaling, rope_scaling

MODEL_TYPES = ("qwen3_vl", "qwen3_vl_moe")
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh")

# The only value of each field that megavlm computes. "" is config.json itself. Some are no fields of transformers'
# classes, but read by it if they are there, or were in earlier versions.
_ONLY: dict[str, dict[str, Any]] = {
    "": {"quantization_config": None, "per_layer_config": None, "is_encoder_decoder": False},
    "text_config": {
        "attention_dropout": 0.0,
        "is_causal": True,
        "norm_topk_prob": True,
        "per_layer_config": None,
        "quantization_config": None,
    },
    "vision_config": {"per_layer_config": None, "quantization_config": None},
}
_COUNTS = {  # fields that are whole numbers of at least 1
    "text_config": (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "max_position_embeddings"),
        *("num_experts", "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step"),
    ),
    "vision_config": (
        *("depth", "hidden_size", "intermediate_size", "num_heads", "in_channels", "patch_size"),
        *("spatial_merge_size", "temporal_patch_size", "out_hidden_size", "num_position_embeddings"),
    ),
}
_POSITIVE = {"text_config": ("rms_norm_eps", "initializer_range"), "vision_config": ("initializer_range",)}


@dataclass(frozen=True)
class MoeShape:
    """The mixture of experts (MoE) of a language model.

    Attributes:
        num_experts: number of experts in each MoE layer.
        top_k: number of experts that process a token. Their probabilities are rescaled to sum to one.
        ffn: inner width of an expert.
        sparse_step: layer i is an MoE layer if (i + 1) is a multiple of it and i is not in ``dense_layers``.
        dense_layers: layers with a dense MLP of width ``TextShape.ffn``.
    """

    num_experts: int
    top_k: int
    ffn: int
    sparse_step: int
    dense_layers: tuple[int, ...]


@dataclass(frozen=True)
class TextShape:
    """The Qwen3 decoder.

    ``mrope_section`` has the numbers of rotary frequencies for time, height and width, which sum to ``head_dim / 2``.
    ``rope_scaling`` is None if they are not stretched. ``moe`` is None for a dense model.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    rms_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    mrope_section: tuple[int, int, int]
    max_positions: int
    attention_bias: bool
    hidden_act: str
    init_std: float
    moe: MoeShape | None

    def is_moe_layer(self, layer: int) -> bool:
        """Whether decoder layer ``layer`` (counted from 0) is an MoE layer, by the same rule as in transformers."""
        if self.moe is None or layer in self.moe.dense_layers:
            return False
        return self.moe.num_experts > 0 and (layer + 1) % self.moe.sparse_step == 0


@dataclass(frozen=True)
class VisionShape:
    """The vision tower.

    Attributes:
        num_positions: number of learned positions, which form a square grid.
        deepstack_layers: blocks whose outputs are added to the outputs of the decoder's first layers.
        out_hidden: width of a visual token, which is made of ``spatial_merge_size`` squared patches.
    """

    hidden: int
    layers: int
    heads: int
    ffn: int
    patch_size: int
    temporal_patch_size: int
    in_channels: int
    spatial_merge_size: int
    num_positions: int
    deepstack_layers: tuple[int, ...]
    out_hidden: int
    hidden_act: str
    rope_theta: float
    init_std: float

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.hidden // self.heads

    @property
    def patch_dim(self) -> int:
        """Number of values in a flattened patch: channels × frames × rows × columns."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def grid_side(self) -> int:
        """Side length of the square grid of learned positions."""
        return round(self.num_positions**0.5)

    @property
    def merged_hidden(self) -> int:
        """Width of the concatenated patches of one visual token."""
        return self.hidden * self.spatial_merge_size**2


@dataclass(frozen=True)
class Shapes:
    """All shapes of a model. ``tied``: the output layer uses the weight of the word embedding."""

    model_type: str
    text: TextShape
    vision: VisionShape
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    tied: bool

    @classmethod
    def from_hf(cls, folder: str | Path) -> "Shapes":
        """Reads a folder's config.json, as transformers 4 or 5 writes it.

        Raises:
            UserError: there is no such folder or no config.json in it, or it is not JSON, is not of a Qwen3-VL, has
                a value that is not implemented, or has values that contradict each other.
        """
        config, file = _read_config(Path(folder)), Path(folder) / "config.json"
        _check_fields(config, file)
        text, vision = config.text_config, config.vision_config
        rope = text.rope_parameters
        shapes = cls(
            model_type=config.model_type,
            text=TextShape(
                hidden=text.hidden_size,
                layers=text.num_hidden_layers,
                heads=text.num_attention_heads,
                kv_heads=text.num_key_value_heads,
                head_dim=text.head_dim,
                ffn=text.intermediate_size,
                vocab=text.vocab_size,
                rms_eps=text.rms_norm_eps,
                rope_theta=float(rope["rope_theta"]),
                rope_scaling=rope_scaling(
                    rope, text.head_dim, text.max_position_embeddings, f"{file}: text_config.rope_parameters"
                ),
                mrope_section=tuple(rope.get("mrope_section") or (24, 20, 20)),  # transformers' default
                max_positions=text.max_position_embeddings,
                attention_bias=text.attention_bias,
                hidden_act=text.hidden_act,
                init_std=text.initializer_range,
                moe=_moe(text) if config.model_type == "qwen3_vl_moe" else None,
            ),
            vision=VisionShape(
                hidden=vision.hidden_size,
                layers=vision.depth,
                heads=vision.num_heads,
                ffn=vision.intermediate_size,
                patch_size=vision.patch_size,
                temporal_patch_size=vision.temporal_patch_size,
                in_channels=vision.in_channels,
                spatial_merge_size=vision.spatial_merge_size,
                num_positions=vision.num_position_embeddings,
                deepstack_layers=tuple(vision.deepstack_visual_indexes),
                out_hidden=vision.out_hidden_size,
                hidden_act=vision.hidden_act,
                rope_theta=float((vision.rope_parameters or {}).get("rope_theta", 10000.0)),
                init_std=vision.initializer_range,
            ),
            image_token_id=config.image_token_id,
            video_token_id=config.video_token_id,
            vision_start_token_id=config.vision_start_token_id,
            vision_end_token_id=config.vision_end_token_id,
            tied=bool(config.tie_word_embeddings),
        )
        shapes._check(file)
        return shapes

    def with_vocabulary(self, rows: int) -> "Shapes":
        """The same shapes with another number of rows of word embedding and output layer."""
        return replace(self, text=replace(self.text, vocab=rows))

    def _check(self, file: Path) -> None:
        text, vision = self.text, self.vision
        rules = [
            (
                text.heads % text.kv_heads == 0,
                "text_config.num_attention_heads must be a multiple of num_key_value_heads",
            ),
            (
                len(text.mrope_section) == 3 and 2 * sum(text.mrope_section) == text.head_dim,
                "mrope_section must have three numbers that sum to half of text_config.head_dim",
            ),
            (
                text.moe is None or 2 <= text.moe.top_k <= text.moe.num_experts,
                "text_config.num_experts_per_tok must be at least 2, and at most num_experts",
            ),
            (vision.hidden % vision.heads == 0, "vision_config.hidden_size must be a multiple of num_heads"),
            (vision.grid_side**2 == vision.num_positions, "vision_config.num_position_embeddings must be a square"),
            (vision.out_hidden == text.hidden, "vision_config.out_hidden_size must equal text_config.hidden_size"),
            (
                all(0 <= layer < vision.layers for layer in vision.deepstack_layers),
                f"vision_config.deepstack_visual_indexes must lie in 0..{vision.layers - 1}",
            ),
            (
                list(vision.deepstack_layers) == sorted(set(vision.deepstack_layers)),
                "vision_config.deepstack_visual_indexes must be in ascending order",
            ),
            (
                len(vision.deepstack_layers) <= text.layers,
                "vision_config.deepstack_visual_indexes must not have more entries than the decoder has layers",
            ),
        ]
        for holds, rule in rules:
            if not holds:
                raise UserError(f"{file}: {rule}", "correct the file, or use the released config.json of this model")


def _moe(text: Any) -> MoeShape:
    return MoeShape(
        num_experts=text.num_experts,
        top_k=text.num_experts_per_tok,
        ffn=text.moe_intermediate_size,
        sparse_step=text.decoder_sparse_step,
        dense_layers=tuple(text.mlp_only_layers),
    )


def _check_fields(config: Any, file: Path) -> None:
    """Checks every field alone. Raises a UserError that names the field, its value and what is allowed."""

    def refuse(section: str, name: str, value: Any, allowed: str) -> UserError:
        return _refused(file, section, name, value, allowed)

    parts = {"text_config": config.text_config, "vision_config": config.vision_config}
    for section, names in _COUNTS.items():
        for name in names:
            value = getattr(parts[section], name, 1)  # a dense model has no experts
            if not isinstance(value, int) or value < 1:
                raise refuse(section, name, value, "whole numbers of at least 1")
    for section, names in _POSITIVE.items():
        for name in names:
            value = getattr(parts[section], name)
            if not 0 < value < math.inf:
                raise refuse(section, name, value, "numbers greater than 0")
    for section, part in parts.items():
        if (value := part.hidden_act) not in ACTIVATIONS:
            raise refuse(section, "hidden_act", value, " or ".join(ACTIVATIONS))
    if set(kinds := getattr(config.text_config, "layer_types", None) or ()) - {"full_attention"}:
        raise refuse("text_config", "layer_types", kinds, "full_attention")
    vision = config.vision_config
    if (width := getattr(vision, "head_dim", None)) and width * vision.num_heads != vision.hidden_size:
        raise refuse("vision_config", "head_dim", width, "hidden_size / num_heads")
    rope = vision.rope_parameters or {}
    if (kind := rope.get("rope_type", "axial")) != "axial":
        raise refuse("vision_config", "rope_parameters.rope_type", kind, "'axial'")
    if not isinstance(theta := rope.get("rope_theta", 1e4), int | float) or not 0 < theta < math.inf:
        raise refuse("vision_config", "rope_parameters.rope_theta", theta, "numbers greater than 0")


def _refused(file: Path, section: str, name: str, value: Any, allowed: str) -> UserError:
    key = f"{section}.{name}".removeprefix(".")
    remedy = "correct the file, or give the folder of another model"
    if name == "quantization_config":
        remedy = "give the folder of the same model in bfloat16, float16 or float32"
    return UserError(f"{file}: {key} is {quoted(value)}; megavlm implements only {allowed}", remedy)


def _read_config(folder: Path) -> Any:
    """transformers' configuration object of a local folder. Checks first what transformers reports unclearly."""
    if not folder.is_dir():
        raise UserError(f"no such Hugging Face folder: {folder}", "give a local folder with config.json")
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(
            f"{folder} has no config.json", "give a Hugging Face model folder; a download may be incomplete"
        )
    try:
        raw = parse_json(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{file} is not valid JSON: {shortened(error)}", "correct the file or download it again"
        ) from None
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if kind not in MODEL_TYPES:
        raise UserError(
            f"{file}: model_type is {quoted(kind)}; allowed: {', '.join(MODEL_TYPES)}", "give a Qwen3-VL folder"
        )
    for section, fields in _ONLY.items():
        given = raw.get(section) if section else raw
        for name, only in fields.items():
            value = given.get(name) if isinstance(given, dict) else None
            if value not in (only, None):
                raise _refused(file, section, name, value, repr(only))

    from transformers import AutoConfig  # takes seconds to import, so only where it is needed

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises exceptions of its own for a field with a wrong type
        raise UserError(
            f"{file} cannot be read as a {kind} configuration: {shortened(error)}",
            "correct the file, or use the released config.json of this model",
        ) from error
