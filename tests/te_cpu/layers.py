"""Matrix products, norms and the rotary embedding: names and arguments are those of TE's extension."""

import torch
from torch import Tensor

from te_cpu.device import as_torch
from te_cpu.fp8 import operand, quantize


def generic_gemm(
    a, transposed_a, b, transposed_b, out, quantizer, dtype, bias, bias_dtype, gelu, gelu_in, grad, workspace, size,
    accumulate, split, comm_overlap=None, comm_type=None, extra_output=None, bulk_overlap=False, alpha=1.0, beta=None,
):  # fmt: skip
    """op(b) @ op(a), as cuBLAS sees rows for columns, summed in float32 whatever the operands.

    With ``grad``, ``bias`` asks for the sum of b over its tokens.
    """
    assert comm_overlap is None
    assert quantizer is None
    assert not gelu
    assert alpha == 1.0
    narrow = b.dtype if isinstance(b, Tensor) else torch.bfloat16
    a, b = operand(a, transposed_a), operand(b, not transposed_b)
    product = _matrix(b, transposed_b) @ _matrix(a, not transposed_a).t()
    sums = b.flatten(0, -2).sum(0).to(bias.dtype) if grad and bias is not None else None
    if bias is not None and not grad:
        product = product + bias
    if not transposed_b:
        product = product.view(*b.shape[:-1], -1)
    if out is None:
        return product.to(as_torch(dtype) if dtype is not None else narrow), sums, None, None
    _put(out, product.view(out.shape), accumulate)
    return out, sums, None, None


def te_general_grouped_gemm(
    a, transposed_a, b, transposed_b, out, dtype, splits, bias, bias_dtype, single_output, gelu_in, grad, workspaces,
    size, accumulate, split, sm_count,
):  # fmt: skip
    """``generic_gemm`` of each pair; ``out`` is one matrix for all (``single_output``) or a matrix for each."""
    outs = out[0].split([int(n) for n in splits]) if single_output else out
    for left, right, into in zip(b, a, outs, strict=True):
        left, right = operand(left, not transposed_b), operand(right, transposed_a)
        _put(into, _matrix(left, transposed_b) @ _matrix(right, not transposed_a).t(), accumulate)
    return bias


def _matrix(x: Tensor, transposed: bool) -> Tensor:
    matrix = x.reshape(-1, x.shape[-1])
    return matrix.t() if transposed else matrix


def _put(out: Tensor, values: Tensor, accumulate: bool) -> None:
    if accumulate:
        out.add_(values)
    else:
        out.copy_(values)


def rmsnorm_fwd(x, weight, eps, out, quantizer, dtype, sm_margin, zero_centered):
    """(normalised, None, 1 / root mean square), the last in float32."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1) + eps)
    return _written(out, wide * scale[..., None] * _gamma(weight, zero_centered), dtype, quantizer), None, scale


def rmsnorm_bwd(grad, x, scale, weight, sm_margin, zero_centered, *more):
    assert not more
    dy, normed = _rows(grad), _rows(x) * scale.view(-1, 1)
    dx = dy * _gamma(weight, zero_centered)
    dx = scale.view(-1, 1) * (dx - normed * (dx * normed).mean(-1, keepdim=True))
    return dx.view(x.shape).to(x.dtype), (dy * normed).sum(0).to(weight.dtype)


def layernorm_fwd(x, weight, bias, eps, out, quantizer, dtype, sm_margin, zero_centered):
    """(normalised, mean, 1 / standard deviation), the last two in float32."""
    wide = x.float()
    mean, scale = wide.mean(-1), torch.rsqrt(wide.var(-1, unbiased=False) + eps)
    y = (wide - mean[..., None]) * scale[..., None] * _gamma(weight, zero_centered) + bias.float()
    return _written(out, y, dtype, quantizer), mean, scale


def layernorm_bwd(grad, x, mean, scale, weight, sm_margin, zero_centered):
    dy, normed = _rows(grad), (_rows(x) - mean.view(-1, 1)) * scale.view(-1, 1)
    dx = dy * _gamma(weight, zero_centered)
    dx = scale.view(-1, 1) * (dx - dx.mean(-1, keepdim=True) - normed * (dx * normed).mean(-1, keepdim=True))
    return dx.view(x.shape).to(x.dtype), (dy * normed).sum(0).to(weight.dtype), dy.sum(0).to(weight.dtype)


def _gamma(weight: Tensor, zero_centered: bool) -> Tensor:
    return weight.float() + (1 if zero_centered else 0)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).float()


def _written(out: Tensor | None, values: Tensor, dtype, quantizer):
    if quantizer is not None:
        return quantize(values.to(as_torch(dtype)), quantizer, out)
    return values.to(as_torch(dtype)) if out is None else out.copy_(values)


def fused_rope_forward(x, angles, starts, layout, interleaved, cu_seqlens, context, rank):
    """x [s, b, heads, dim] with angles [s, 1, 1, rotated dims] in float32, one of each token."""
    return _turned(x, angles, interleaved, 1)


def fused_rope_backward(grad, angles, starts, layout, interleaved, cu_seqlens, context, rank):
    return _turned(grad, angles, interleaved, -1)


def _turned(x: Tensor, angles: Tensor, interleaved: bool, sign: int) -> Tensor:
    assert not interleaved
    assert angles.dtype == torch.float32
    assert len(angles) == len(x)
    turns, rest = x[..., : angles.shape[-1]].float(), x[..., angles.shape[-1] :]
    first, second = turns.chunk(2, -1)
    turned = turns * angles.cos() + torch.cat((-second, first), -1) * angles.sin() * sign
    return torch.cat((turned.to(x.dtype), rest), -1)


ANSWERS = [
    *(generic_gemm, te_general_grouped_gemm, rmsnorm_fwd, rmsnorm_bwd, layernorm_fwd, layernorm_bwd),
    *(fused_rope_forward, fused_rope_backward),
]
