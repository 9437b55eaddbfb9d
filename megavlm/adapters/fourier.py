"""FourierFT (arXiv:2405.03003) on a Megatron linear layer: ΔW is the inverse Fourier transform of a sparse spectrum."""

from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce
from megatron.core.tensor_parallel.mappings import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn

from megavlm.adapters.base_weight import saved_as
from megavlm.adapters.linear_adapter import LinearAdapter
from megavlm.adapters.sites import COLUMN
from megavlm.convert.adapter import fourier_change
from megavlm.convert.peft_names import SPECTRUM


class Fourier(LinearAdapter):
    """y = W x + ΔW x. ΔW is as large as W, so it is not kept for the backward pass but computed again."""

    def _mark(self, parameter: nn.Parameter, axis: int | None) -> None:
        super()._mark(parameter, axis)
        # ``of_ranks`` has already summed the gradients over ranks
        parameter.sequence_parallel = False  # type: ignore[attr-defined]  # an attribute that Megatron reads

    def weight(self) -> Tensor:
        """This rank's share of ΔW, [out, in], in the order of the weight's rows."""
        site, changes = self.site, []
        for part, parameter, rows in zip(self.parts, self.of_kind(SPECTRUM), self.rows, strict=True):
            if part is None or parameter is None:
                inner = site.entry.shape[-1] // (1 if site.cut == COLUMN else site.ranks)
                changes.append(next(self.parameters()).new_zeros(rows, inner))
                continue
            spectrum = site.of_ranks(parameter)
            change = fourier_change(spectrum, (part.out, part.inner), self.settings.scaling, self.settings.seed)
            changes.append(site.share(change, site.cut).to(spectrum.dtype))
        return self.join(changes).contiguous()

    def forward(self, linear: nn.Module, inputs: Tensor, output: Tensor) -> Tensor:
        site, weight = self.site, self.weight()
        column = site.cut == COLUMN and site.ranks > 1
        with saved_as(weight, lambda: self.weight().detach()):
            change = linear_with_grad_accumulation_and_async_allreduce(
                inputs, weight, None, False,
                allreduce_dgrad=column and not site.sequence_parallel,
                sequence_parallel=column and site.sequence_parallel,
                tp_group=site.group,
            )  # fmt: skip
        if site.ranks > 1 and not column:
            across = (
                reduce_scatter_to_sequence_parallel_region
                if site.sequence_parallel
                else reduce_from_tensor_model_parallel_region
            )
            change = across(change, group=site.group)
        return output + change
