"""LoRA (arXiv:2106.09685; rank-stabilised: arXiv:2312.03732) and DoRA (arXiv:2402.09353) on a Megatron linear layer."""

import contextlib
from collections.abc import Callable
from typing import cast

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor, nn
from torch.nn import functional as F

from megavlm.adapters.base_weight import weight_of
from megavlm.adapters.linear_adapter import LinearAdapter
from megavlm.adapters.sites import COLUMN, ROW
from megavlm.convert.peft_names import LORA_A, LORA_B, MAGNITUDE, scale_of


class Lora(LinearAdapter):
    """y = W x + s B A x, where W may fuse several HF linear layers.

    Their A matrices are stacked and their B matrices form a block-diagonal matrix in the order of W's rows, so two
    products compute the change of all of them.
    """

    def factors(self) -> tuple[Tensor, Tensor]:
        """A [r, in] and B [out, r] of this rank's share of the weight; r is the sum over all parts, B includes s."""
        below: list[Tensor] = [a for a in self.of_kind(LORA_A) if a is not None]
        total, first, blocks = sum(len(a) for a in below), 0, []
        for part, parameter, rows in zip(self.parts, self.of_kind(LORA_B), self.rows, strict=True):
            if part is None or parameter is None:
                blocks.append(below[0].new_zeros(rows, total))
                continue
            matrix = parameter.flatten(0, -2) * scale_of(self.settings, part.name)
            last = first + matrix.shape[1]
            blocks.append(F.pad(matrix, (first, total - last)))
            first = last
        down, up = torch.cat(below), self.join(blocks)
        # One factor is replicated over the ranks that share an expert, so its gradient is summed over them here. The
        # other factor is sharded.
        if self.site.expert is not None:
            if self.site.cut == COLUMN:
                down = self.site.of_ranks(down)
            else:
                up = self.site.of_ranks(up)
        return down, up

    def change(self, inputs: Tensor, factors: tuple[Tensor, Tensor]) -> Tensor:
        """s B A x, [t', …, out]."""
        down, up = factors
        if self.settings.dropout and self.training:
            own = get_cuda_rng_tracker().fork() if self.site.own_tokens() else contextlib.nullcontext()
            with own:
                inputs = F.dropout(inputs, self.settings.dropout)
        return F.linear(self.site.cross(F.linear(inputs, down)), up)

    def forward(self, linear: nn.Module, inputs: Tensor, output: Tensor) -> Tensor:
        return output + self.change(inputs, self.factors())


class Dora(Lora):
    """y = m (W + s B A) x / ‖W + s B A‖, row by row; backward treats the norm as a constant (section 4.3 of the paper).

    Parts that are not targets have m = ‖W‖. Dropout is applied only to the input of A, not to that of W.
    """

    def forward(self, linear: nn.Module, inputs: Tensor, output: Tensor) -> Tensor:
        factors = self.factors()
        lengths = self._lengths(linear, factors)
        own = self.of_kind(MAGNITUDE)
        magnitudes: list[Tensor] = [
            lengths.new_ones(rows) if magnitude is None else magnitude
            for magnitude, rows in zip(own, self.rows, strict=True)
        ]
        targets = [
            torch.full_like(magnitude, part is not None, dtype=torch.bool)
            for part, magnitude in zip(self.parts, magnitudes, strict=True)
        ]
        ratio = torch.where(self.join(targets), self.join(magnitudes) / lengths, 1.0).to(output.dtype)
        plain = output - cast(Tensor, linear.bias) if _adds_bias(linear) else output
        return output + (ratio - 1) * plain + ratio * self.change(inputs, factors)

    @torch.no_grad()
    def _lengths(self, linear: nn.Module, factors: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """float32 [out]: the norm of each row of the weight, with the adapter's change or without."""
        weight = weight_of(linear)
        if factors is not None:
            down, up = factors
            weight = weight + up @ down
        lengths = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)
        if self.site.cut == ROW and self.site.ranks > 1:
            squares = lengths.square()
            dist.all_reduce(squares, group=self.site.group)
            lengths = squares.sqrt()
        return lengths

    @torch.no_grad()
    def begin(self, read: Callable[[str, int | None], dict[str, Tensor]] | None, seed: int) -> None:
        """See ``LinearAdapter.begin``. A new m is the norm of each row of the weight."""
        super().begin(read, seed)
        if read is None:
            lengths = self.site.layout.to_hf(self._lengths(self.site.linear), [(rows,) for rows in self.rows])
            for own, length in zip(self.of_kind(MAGNITUDE), lengths, strict=True):
                if own is not None:
                    own.copy_(length)


def _adds_bias(linear: nn.Module) -> bool:
    """Whether the output includes the bias; the linear layers of Megatron and TE may return it separately instead."""
    apart = getattr(linear, "skip_bias_add", False) or getattr(linear, "te_return_bias", False)
    return isinstance(linear.bias, Tensor) and linear.bias.numel() > 0 and not apart
