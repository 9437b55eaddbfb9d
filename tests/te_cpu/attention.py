"""Attention within the segments of a packed row ("thd"), and the functions that context parallelism merges it with."""

import torch
from torch import Tensor


def get_fused_attn_backend(*args, **kwargs):
    """cuDNN's kernel for 16 bits and any length: (backend, message)."""
    import transformer_engine_torch as tex

    return tex.NVTE_Fused_Attn_Backend.NVTE_F16_arbitrary_seqlen, ""


def fused_attn_fwd(
    longest_q, longest_kv, is_training, scale, dropout, fill, layout, out_format, scale_format, bias, mask, softmax,
    window, bottom_right, cu_q, cu_kv, q, k, v, dtype, padded_q, padded_kv, *more,
):  # fmt: skip
    """q [t, heads, dim], k and v [t', kv heads, dim] -> [out, log of the sums of exp [t, heads, 1], random state]."""
    out, sums = torch.zeros_like(q), q.new_zeros(*q.shape[:2], 1, dtype=torch.float32)
    for here, there, logits in _segments(longest_q, longest_kv, cu_q, cu_kv, padded_q, padded_kv, q, k, scale, mask):
        sums[here, :, 0] = logits.logsumexp(-1).t()
        out[here] = torch.einsum("hqk,khd->qhd", logits.softmax(-1), _of_heads(v[there], q)).to(q.dtype)
    return [out, sums, torch.zeros(2, dtype=torch.int64)]


def fused_attn_bwd(
    longest_q, longest_kv, scale, dropout, fill, layout, out_format, grad_format, grads_layout, scale_format,
    grad_scale_format, bias, mask, softmax, window, bottom_right, deterministic, cu_q, cu_kv, q, k, v, out, grad, dtype,
    saved, padded_q, padded_kv, *more,
):  # fmt: skip
    """[dq, dk, dv, None] by the sums in ``saved``, which may be of more keys than ``k`` has, as ``out`` may be."""
    dq, dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v))
    grad, sums = grad.view(out.shape).float(), saved[0]
    for here, there, logits in _segments(longest_q, longest_kv, cu_q, cu_kv, padded_q, padded_kv, q, k, scale, mask):
        p = (logits - sums[here, :, 0].t()[..., None]).exp()
        dp = torch.einsum("qhd,khd->hqk", grad[here], _of_heads(v[there], q))
        ds = p * (dp - (grad[here] * out[here]).sum(-1).t()[..., None]) * scale
        dq[here] = torch.einsum("hqk,khd->qhd", ds, _of_heads(k[there], q))
        for into, weights, x in ((dk, ds, q), (dv, p, grad)):
            each = torch.einsum("hqk,qhd->khd", weights, x[here].float())
            into[there] = each.unflatten(1, (k.shape[1], -1)).sum(2)
    return [dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None]


def _of_heads(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values [k, kv heads, dim] in float32, once for each head of the queries."""
    return x.float().repeat_interleave(q.shape[1] // x.shape[1], 1)


def _segments(longest_q, longest_kv, cu_q, cu_kv, padded_q, padded_kv, q, k, scale, mask):
    """(its queries, its keys, logits [heads, q, k] in float32) of each segment that is not empty."""
    import transformer_engine_torch as tex

    causal = {tex.NVTE_Mask_Type.NVTE_PADDING_CAUSAL_MASK: True, tex.NVTE_Mask_Type.NVTE_PADDING_MASK: False}[mask]
    begins = [(cu if padded is None else padded).tolist() for cu, padded in ((cu_q, padded_q), (cu_kv, padded_kv))]
    assert begins[0][-1] == len(q)
    assert begins[1][-1] == len(k)
    for start_q, start_k, count_q, count_k in zip(*begins, cu_q.diff().tolist(), cu_kv.diff().tolist(), strict=False):
        assert count_q <= longest_q
        assert count_k <= longest_kv
        if not count_q:
            continue
        here, there = slice(start_q, start_q + count_q), slice(start_k, start_k + count_k)
        logits = torch.einsum("qhd,khd->hqk", q[here].float(), _of_heads(k[there], q)) * scale
        if causal:
            assert count_q == count_k
            logits.masked_fill_(torch.ones(count_q, count_k, dtype=torch.bool).triu(1), -torch.inf)
        yield here, there, logits


def _halves(cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens in the first, and those in the second half of their segments: a rank has both, end to end."""
    first, second = [], []
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        middle = (start + end) // 2
        first += range(start, middle)
        second += range(middle, end)
    return torch.tensor(first, dtype=torch.int64), torch.tensor(second, dtype=torch.int64)


def thd_read_half_tensor(x, cu_seqlens, half):
    """[t, …] -> [t / 2, …]: the tokens of the first (0) or second (1) halves."""
    return x[_halves(cu_seqlens)[half]]


def thd_read_second_half_lse(sums, cu_seqlens, packed, count):
    """[heads, t] -> [heads, t / 2]."""
    assert packed
    second = _halves(cu_seqlens)[1]
    assert len(second) == count
    return sums[:, second]


def thd_second_half_lse_correction(sums, more, cu_seqlens, packed):
    """Adds the sums ``more`` [heads, t / 2], in place."""
    assert packed
    second = _halves(cu_seqlens)[1]
    sums[:, second] = torch.logaddexp(sums[:, second], more)


def thd_out_correction(out, part, before, sums, more, cu_seqlens, only_second_half, packed):
    """out [t, heads, dim] with the sums ``before`` and a ``part`` with the sums ``more``, put together to ``sums``."""
    assert packed
    here = _halves(cu_seqlens)[1] if only_second_half else torch.arange(len(out))
    sums = sums[:, here]
    old, new = ((x - sums).exp().t()[..., None] for x in (before[:, here], more))
    out[here] = (out[here] * old + part.view(len(here), *out.shape[1:]) * new).to(out.dtype)


def thd_grad_correction(grad, part, cu_seqlens, first, second):
    """``add``, ``copy``, ``zero`` or ``none`` in each half. A ``part`` of half the tokens is for the half in use."""
    halves = dict(zip(_halves(cu_seqlens), (first, second), strict=True))
    for here, what in halves.items():
        values = part if len(part) == len(here) else part[here]
        if what == "add":
            grad[here] += values
        elif what == "copy":
            grad[here] = values
        elif what == "zero":
            grad[here] = 0
        else:
            assert what == "none"


ANSWERS = [
    *(get_fused_attn_backend, fused_attn_fwd, fused_attn_bwd, thd_read_half_tensor, thd_read_second_half_lse),
    *(thd_second_half_lse_correction, thd_out_correction, thd_grad_correction),
]
