"""Products of 16-bit matrices that are summed, and returned, in float32: exact products, and no rounding of the sum.

The usual product of bfloat16 matrices is summed in float32, too, but its result is rounded to 8 bits.
"""

import torch
from torch import Tensor


def product(left: Tensor, right: Tensor) -> Tensor:
    """left [n, k] @ right [k, m] -> float32 [n, m]. Without gradients."""
    if left.dtype == torch.float32:
        return left @ right
    if left.is_cuda or left.is_meta:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds left [n, k] @ right [k, m] to ``total``, float32 [n, m]."""
    if left.dtype == torch.float32:
        total.addmm_(left, right)
    elif left.is_meta:
        # there is no kernel that adds: a product of the same size, which needs no memory of its own either
        torch.mm(left, right, out=total.view(left.dtype)[:, : right.shape[1]])
    elif left.is_cuda:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(left.float(), right.float())
