"""Model FLOPs of a training step: what the mathematics needs, whatever the layout.

Padding, recomputation and communication are not counted. A product of an [m, k] with a [k, n] matrix is 2·m·k·n
operations. Causal attention counts half of its square, norms, activations and rotations count nothing. A matrix's
backward pass costs its forward cost once for the gradient of its input and once for that of its weight; of the two,
only what the frozen parts leave to do is counted. The word embedding is a look-up; the output layer is counted for
the target tokens alone, the only ones whose logits are needed.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields

from megavlm.model.shapes import Shapes, TextShape, VisionShape

# Dense bf16 peak in TFLOP/s by a part of the device's name, from NVIDIA's data sheets. The first match counts.
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
    """What a step has computed, summed over the rows of all ranks. Counts; whole numbers, floats where they are large.

    Attributes:
        tokens: useful tokens, padding left out.
        segment_squares: sum of squares of the samples' lengths in tokens.
        target_tokens: tokens that are predicted.
        patches: vision patches.
        frame_squares: sum of squares of the frames' numbers of patches.
    """

    tokens: float
    segment_squares: float
    target_tokens: float
    patches: float
    frame_squares: float

    @classmethod
    def from_counts(cls, counts: Mapping[str, float]) -> "Work":
        """From a mapping that has these names, among others."""
        return cls(**{field.name: counts[field.name] for field in fields(cls)})


@dataclass(frozen=True)
class PartFlops:
    """Forward operations of one part: in products with weights, and in attention (products of activations)."""

    weights: float
    attention: float = 0.0


def forward_flops(shapes: Shapes, work: Work) -> dict[str, PartFlops]:
    """Forward operations of the parts "vision", "projector" and "language"."""
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
    """Operations of forward and backward.

    Args:
        shapes: the model's numbers.
        work: what the step has computed, over all ranks.
        frozen: parts that do not learn, of "vision", "projector", "language"; all three: forward alone.
        adapted: parts of which adapters alone learn, whose own few operations are not counted.

    Gradients flow from the loss back to the first part that learns. On that way every product's input gradient is
    counted, and weight gradients where the part learns; nothing beyond it. (The patch embedding's input gradient is
    the exception: nobody needs it.)
    """
    parts = forward_flops(shapes, work)
    total = 0.0
    somebody_before_learns = False
    for name in ("vision", "projector", "language"):  # the way of the data
        forward = parts[name]
        learns, reached = name not in (*frozen, *adapted), name not in frozen
        total += forward.weights + forward.attention
        if learns:
            total += forward.weights
        if reached or somebody_before_learns:
            total += forward.weights + 2 * forward.attention
        if name == "vision" and learns:
            total -= 2 * work.patches * shapes.vision.patch_dim * shapes.vision.hidden
        somebody_before_learns |= reached
    return total


def active_decoder_weights(text: TextShape) -> int:
    """Weights of the decoder's layers that one token meets: attention, and the dense MLP or its chosen experts."""
    attention = text.hidden * text.head_dim * (2 * text.heads + 2 * text.kv_heads)
    total = 0
    for layer in range(text.layers):
        total += attention
        if text.is_moe_layer(layer):
            total += text.moe.top_k * 3 * text.hidden * text.moe.ffn + text.hidden * text.moe.num_experts
        else:
            total += 3 * text.hidden * text.ffn
    return total


def peak_flops(device_name: str | None) -> float | None:
    """bf16 peak in FLOP/s of a device by the name CUDA gives it ("NVIDIA H100 80GB HBM3"); None where not known.

    MFU is measured against it at every precision, so that runs can be compared.
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
