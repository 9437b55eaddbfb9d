"""FP8: what TE's quantizers ask its extension for, in the FP8 types of torch.

TE's own quantized tensors hold the results, as on an H100: bytes, the inverses of the scales, and both again for the
transposed matrix, since Hopper multiplies rows by rows only. Products are those of the values behind the bytes, summed
in float32. So the formats, scales, blocks and shapes are TE's; the order of sums within its kernels is not.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from te_cpu import called
from te_cpu.device import as_torch

BLOCK = 128  # of Float8BlockQuantizer: 1 × 128 numbers of activations and gradients, 128 × 128 of weights
ALIGNED = 16  # bytes of a row of FP8, a condition of cuBLAS


def quantize(x, quantizer, output=None, noop=None):
    """x [..., k] in the quantizer's format, in a new tensor or in what ``output`` has room for."""
    assert noop is None
    out = create_empty_quantized_tensor(quantizer, x.shape, x.dtype) if output is None else output
    (_quantize_blocks if hasattr(quantizer, "block_len") else _quantize_whole)(x, quantizer, out)
    return out


def create_empty_quantized_tensor(quantizer, shape, dtype, device=None, pinned=False):
    """One of TE's quantized tensors, with the parts that the quantizer's usage asks for. Whatever is there is zero."""
    shape = tuple(shape)
    empty = lambda shape, dtype=torch.uint8: torch.zeros(shape, dtype=dtype)
    common = dict(fp8_dtype=quantizer.dtype, quantizer=quantizer, fake_dtype=dtype)
    if not quantizer.internal:  # a subclass of Tensor instead of an object
        common |= dict(shape=shape, dtype=dtype, device=torch.device("cpu"))
    if hasattr(quantizer, "block_len"):
        from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockwiseQTensor
        from transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage import (
            Float8BlockwiseQTensorStorage,
        )

        made = {spec: empty(*sizes) for spec, sizes in quantizer.inner_tensor_specs(shape).items()}
        parts = ("rowwise_data", "rowwise_scale_inv", "columnwise_data", "columnwise_scale_inv")
        return (Float8BlockwiseQTensorStorage if quantizer.internal else Float8BlockwiseQTensor)(
            **{part: made.get(f"_{part}") for part in parts}, is_2D_scaled=quantizer.block_scaling_dim == 2, **common
        )
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Tensor
    from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage

    return (Float8TensorStorage if quantizer.internal else Float8Tensor)(
        data=empty(shape) if quantizer.rowwise_usage else None,
        data_transpose=empty((shape[-1], *shape[:-1])) if quantizer.columnwise_usage else None,
        fp8_scale_inv=empty((1,), torch.float32),
        **common,
    )


def scale_of(largest: Tensor, quantizer) -> Tensor:
    """The factor that brings the largest magnitude, float32, to the largest number of the format; 1 where it is 0."""
    largest = largest.clamp(min=quantizer.amax_epsilon)
    scale = torch.finfo(as_torch(quantizer.dtype)).max / largest
    scale = torch.where(scale.isinf(), torch.finfo(torch.float32).max, scale)
    if quantizer.force_pow_2_scales:  # the power of two at or below it
        mantissa, exponent = torch.frexp(scale)
        scale = torch.ldexp(torch.ones_like(mantissa), exponent - 1)
    return torch.where((largest == 0) | ~largest.isfinite(), 1.0, scale)


def rounded(x: Tensor, dtype) -> Tensor:
    """The bytes of the nearest numbers of an FP8 format; what is beyond its largest number becomes that."""
    fp8 = as_torch(dtype)
    most = torch.finfo(fp8).max
    return x.clamp(-most, most).to(fp8).view(torch.uint8)


def _quantize_whole(x: Tensor, quantizer, out) -> None:
    """One scale: of the tensor as it is (current scaling), or from earlier tensors (delayed)."""
    wide = x.detach().float()
    largest = wide.abs().max().view(1)
    if hasattr(quantizer, "amax"):
        quantizer.amax.copy_(torch.maximum(quantizer.amax, largest))
        scale = quantizer.scale.view(1)
    else:
        if quantizer.with_amax_reduction:
            torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group=quantizer.amax_reduction_group)
        scale = scale_of(largest, quantizer)
    values = rounded(wide * scale, quantizer.dtype)
    if out._data is not None:
        out._data.copy_(values)
    if out._transpose is not None:
        out._transpose.copy_(values.movedim(-1, 0))
        out._transpose_invalid = False
    out._scale_inv.copy_(1 / scale)


def _quantize_blocks(x: Tensor, quantizer, out) -> None:
    """One scale for each 1 × 128 or 128 × 128 numbers of the matrix, and for those of its transpose."""
    matrix = x.detach().reshape(-1, x.shape[-1]).float()
    assert quantizer.is_quantizable(matrix), f"{tuple(x.shape)} is not of whole blocks"
    height = BLOCK if quantizer.block_scaling_dim == 2 else 1
    for rows, data, scales in (
        (matrix, out._rowwise_data, out._rowwise_scale_inv),
        (matrix.t(), out._columnwise_data, out._columnwise_scale_inv),
    ):
        if data is None:
            continue
        tiles = rows.reshape(len(rows) // height, height, -1, BLOCK)
        scale = scale_of(tiles.abs().amax((1, 3), keepdim=True), quantizer)
        data.copy_(rounded(tiles * scale, quantizer.dtype).reshape(data.shape))
        inverse = 1 / scale[:, 0, :, 0]
        inverse = inverse if height == BLOCK else inverse.t()
        scales.copy_(pad(inverse, (0, scales.shape[1] - inverse.shape[1])))


def operand(x, rowwise: bool) -> Tensor:
    """What a product takes, in float32: of a quantized tensor the values of its rows, or those of its transpose."""
    from transformer_engine.pytorch.quantized_tensor import QuantizedTensorStorage

    if not isinstance(x, QuantizedTensorStorage):
        return x.float()  # a CPU without products of 16 bits takes ten times as long for them
    called["operand"] += 1
    parts = x.get_metadata()
    names = ("data", "data_transpose") if "data" in parts else ("rowwise_data", "columnwise_data")
    taken, left = names if rowwise else names[::-1]
    data, parts[left] = parts[taken], None
    assert data is not None, f"an operand in FP8 has no {taken}"
    inner = data.shape[-1] if rowwise else math.prod(data.shape[1:])
    assert inner % ALIGNED == 0, f"cuBLAS cannot add up {inner} products in FP8"
    storage = next(kind for kind in type(x).__mro__ if kind.__name__.endswith("Storage"))
    return storage(**parts).dequantize(dtype=torch.float32)


def fp8_transpose(data, dtype, out=None):
    """Bytes [..., k] -> [k, ...]."""
    turned = data.movedim(-1, 0)
    return turned.contiguous() if out is None else out.copy_(turned)


def swap_first_dims(x, out=None):
    swapped = x.transpose(0, 1)
    return swapped.contiguous() if out is None else out.copy_(swapped)


def bgrad_quantize(grad, quantizer):
    """(the gradient of a bias, the quantized gradient)."""
    return grad.reshape(-1, grad.shape[-1]).float().sum(0).to(grad.dtype), quantize(grad, quantizer)


def split_quantize(x, sizes, quantizers, *more):
    """Rows of x, in pieces, each by its own quantizer."""
    return [quantize(piece, q) for piece, q in zip(x.split([int(n) for n in sizes]), quantizers, strict=True)]


def fused_amax_and_scale_update_after_reduction(largest, histories, scales, algorithm, dtype, margin):
    """Delayed scaling: from the largest magnitudes of this step and earlier ones, the scales of the next step.

    ``largest`` is one vector for all of ``histories``, each [steps, n], whose first row collects the next step's.
    """
    most = torch.finfo(as_torch(dtype)).max
    for now, history, scale in zip(largest.split([h.shape[1] for h in histories]), histories, scales, strict=True):
        history[0] = now
        found = {"max": history.amax(0), "most_recent": now}[algorithm]
        new = torch.where((found > 0) & found.isfinite(), most / found / 2**margin, scale)
        scale.copy_(new.clamp(max=torch.finfo(torch.float32).max))
        history.copy_(history.roll(-1, 0))
        history[0] = 0


ANSWERS = [
    *(quantize, create_empty_quantized_tensor, fp8_transpose, swap_first_dims, bgrad_quantize, split_quantize),
    fused_amax_and_scale_update_after_reduction,
]
