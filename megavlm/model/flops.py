"""Model FLOPs of a training step: the operations that the model needs in any layout.

Padding, recomputation and communication are not counted. The product of an [m, k] and a [k, n] matrix is 2·m·k·n
operations. Causal attention counts as half of its square. Norms, activations and rotations are not counted. The
backward pass of a matrix product costs as much as the forward pass for the gradient of its input, and again for the
gradient of its weight; with frozen parts, only the gradients that are needed are counted. The word embedding is a
look-up and not counted. The output layer is counted only for the target tokens, because only their logits are needed.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields

from megavlm.model.shapes import Shapes, TextShape, VisionShape

# Peak of dense bf16 products in TFLOP/s, by a part of the device's name, from NVIDIA's data sheets. First match wins.
PEAK_BF16_TFLOPS = (
    ("GB300", 2500.0),
    ("B300", 2250.0),
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("H200 NVL", 835.5),
    ("H200", 989.4),
    ("GH200", 989.4),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.5),
    ("H100", 989.4),
    ("H800", 989.4),
    ("H20", 148.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("L40S", 362.0),
)


@dataclass(frozen=True)
class Work:
    """The work of a step, summed over the rows of all ranks. All are counts, as floats because they may be large.

    Attributes:
        tokens: number of tokens without padding.
        segment_squares: sum of the squares of the samples' lengths in tokens.
        target_tokens: number of tokens that are predicted; 0 for a reward model, whose head is not counted.
        patches: number of vision patches.
        frame_squares: sum of the squares of the frames' numbers of patches.
    """

    tokens: float
    segment_squares: float
    target_tokens: float
    patches: float
    frame_squares: float

    @classmethod
    def from_counts(cls, counts: Mapping[str, float]) -> "Work":
        """Takes these counts from a mapping, which may have others."""
        return cls(**{field.name: counts[field.name] for field in fields(cls)})


@dataclass(frozen=True)
class PartFlops:
    """Forward operations of one part: products with weights, and attention (products of activations)."""

    weights: float
    attention: float = 0.0


def forward_flops(shapes: Shapes, work: Work) -> dict[str, PartFlops]:
    """The forward operations of the parts "vision", "projector" and "language"."""
    text, vision = shapes.text, shapes.vision
    visual_tokens = work.patches / vision.spatial_merge_size**2
    head = 2 * work.target_tokens * text.hidden * text.vocab
    return {
        "vision": PartFlops(
            weights=2 * work.patches * _tower_weights(vision),
            attention=4 * work.frame_squares * vision.hidden * vision.layers,
        ),
        "projector": PartFlops(weights=2 * visual_tokens * _projector_weights(vision)),
        "language": PartFlops(
            weights=2 * work.tokens * active_decoder_weights(text) + head,
            attention=2 * work.segment_squares * text.heads * text.head_dim * text.layers,
        ),
    }


def step_flops(shapes: Shapes, work: Work, frozen: Collection[str] = (), adapted: Collection[str] = ()) -> float:
    """The operations of the forward and the backward pass, of all parts (see ``parts_flops``)."""
    return sum(parts_flops(shapes, work, frozen, adapted).values())


def parts_flops(
    shapes: Shapes, work: Work, frozen: Collection[str] = (), adapted: Collection[str] = ()
) -> dict[str, float]:
    """The operations of the forward and the backward pass of the parts "vision", "projector" and "language".

    Args:
        shapes: the model's shapes.
        work: the work of the step, over all ranks.
        frozen: frozen parts, of "vision", "projector" and "language"; if all three are, only the forward pass counts.
        adapted: parts in which only adapters are trained, whose own few operations are not counted.

    Gradients flow from the loss back to the first part that is trained. Up to there, the input gradients of all
    products are counted, and the weight gradients of the parts that are trained. (The patch embedding is the exception:
    its input gradient is never needed.)
    """
    total = {}
    trained_before = False
    for name, forward in forward_flops(shapes, work).items():  # in the order of the forward pass
        trained, reached = name not in (*frozen, *adapted), name not in frozen
        total[name] = forward.weights * (1 + trained) + forward.attention
        if reached or trained_before:
            total[name] += forward.weights + 2 * forward.attention
        if name == "vision" and reached:
            total[name] -= 2 * work.patches * shapes.vision.patch_dim * shapes.vision.hidden
        trained_before |= reached
    return total


def active_decoder_weights(text: TextShape) -> int:
    """The number of weights in the decoder's layers that a token uses: attention, and the MLP or its chosen experts."""
    attention = text.hidden * text.head_dim * (2 * text.heads + 2 * text.kv_heads)
    dense = sum(not text.is_moe_layer(layer) for layer in range(text.layers))
    return text.layers * attention + dense * 3 * text.hidden * text.ffn + experts_of_a_token(text)


def experts_of_a_token(text: TextShape) -> int:
    """The number of weights of the experts that a token uses, and of their routers, in all layers that have them."""
    if text.moe is None:
        return 0
    of_a_layer = text.moe.top_k * 3 * text.hidden * text.moe.ffn + text.hidden * text.moe.num_experts
    return of_a_layer * sum(text.is_moe_layer(layer) for layer in range(text.layers))


def peak_flops(device_name: str | None) -> float | None:
    """The bf16 peak in FLOP/s of a device with the given CUDA name ("NVIDIA H100 80GB HBM3"); None if unknown.

    MFU is relative to it at every precision, so that runs can be compared.
    """
    for part, tflops in PEAK_BF16_TFLOPS:
        if device_name and part.lower() in device_name.lower():
            return tflops * 1e12
    return None


def _tower_weights(vision: VisionShape) -> int:
    block = 4 * vision.hidden**2 + 2 * vision.hidden * vision.ffn
    return vision.patch_dim * vision.hidden + vision.layers * block


def _projector_weights(vision: VisionShape) -> int:
    merger = vision.merged_hidden**2 + vision.merged_hidden * vision.out_hidden
    return merger * (1 + len(vision.deepstack_layers))
