"""Counts the tokens of a step that the routers of a mixture of experts send to each expert; adds up their losses."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from torch import Tensor

from megavlm.model.vlm import VLM
from megavlm.monitor.expert_metrics import ExpertTotals
from megavlm.platform import device

_LOSSES = ("load_balancing_loss", "z_loss")  # Megatron's names of the losses that its routers record


class ExpertLoad:
    """Counts the choices of this rank's routers; for a dense model nothing is counted.

    The counts stay on the device. Padding is not counted, and neither are passes outside of ``counting``: those of
    other weights, of sampling, and those that recompute a layer in the backward pass.

    Args:
        vlm: the model.
    """

    def __init__(self, vlm: VLM) -> None:
        text, self._data_ranks = vlm.shapes.text, vlm.groups.dp_size
        self._layers = [i for i in range(text.layers) if text.is_moe_layer(i)]
        self._is_counting, self._rows = False, 0
        if text.moe is None:
            return
        # by layer of the whole decoder: choices of each expert; the sums of both losses
        self._sums = torch.zeros(text.layers, text.moe.num_experts + len(_LOSSES), dtype=torch.float64, device=device())
        for layer in (layer for chunk in vlm.language for layer in chunk.decoder.layers):
            if isinstance(layer.mlp, MoELayer):
                layer.mlp.router.register_forward_hook(self._hook(layer.layer_number - 1), with_kwargs=True)

    def start(self) -> None:
        """Begins to count anew."""
        self._rows = 0
        if self._layers:
            self._sums.zero_()

    @contextmanager
    def counting(self) -> Iterator[None]:
        """A context for the forward pass of a micro-batch that is learned from."""
        self._is_counting = True
        try:
            yield
        finally:
            self._is_counting = False

    def take_losses(self, num_rows: int) -> None:
        """Adds what Megatron has recorded of the routers' losses in the passes of ``num_rows`` micro-batches."""
        tracker = get_moe_metrics_tracker()
        if self._layers:
            self._rows += num_rows
            for place, name in enumerate(_LOSSES, start=-len(_LOSSES)):
                if name in tracker.metrics:
                    self._sums[:, place] += tracker.metrics[name].values
        tracker.clear()  # otherwise it would go on adding

    def totals(self) -> ExpertTotals | None:
        """The sums since ``start`` over the global batch, on rank 0; None elsewhere, or for a dense model.

        Also None if nothing was learned, as in steps in which a critic learns alone. Call it on all ranks. It waits for
        the device.
        """
        if not self._layers or not self._rows:
            return None
        sums = self._sums.clone()
        dist.reduce(sums, 0)
        if dist.get_rank() > 0:
            return None
        sums = sums[self._layers].cpu()
        # A layer's loss of a row is a mean over the row's tokens, of which the ranks that share them have parts.
        rows = self._rows * self._data_ranks
        balancing, z = (sums[:, -2] / rows).tolist(), (sums[:, -1] / rows).tolist()
        tokens = sums[:, : -len(_LOSSES)].long().tolist()
        return ExpertTotals(
            [layer + 1 for layer in self._layers],
            tokens,
            balancing if any(balancing) else None,
            z if any(z) else None,
        )

    def _hook(self, layer: int) -> Any:
        def count(router: Any, args: tuple, kwargs: dict, result: tuple[Tensor, Tensor]) -> None:
            if not self._is_counting:
                return
            with torch.no_grad():
                chosen = result[1].view(-1, result[1].shape[-1])  # bool [t, experts]
                padding = args[1] if len(args) > 1 else kwargs.get("padding_mask")
                if padding is not None:
                    chosen = chosen & ~padding.reshape(-1, 1)
                self._sums[layer, : chosen.shape[1]] += chosen.sum(dim=0)

        return count
