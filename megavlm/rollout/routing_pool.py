"""Records which experts tokens go to while answers are sampled, in the slots of their keys and values."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megavlm.model.vlm import VLM
from megavlm.platform import device, to_device
from megavlm.platform.collectives import gather_objects
from megavlm.rollout.answers import Growing, OpenPrompt
from megavlm.rollout.blocks import BLOCK_TOKENS, Blocks
from megavlm.runtime.routing import Choose


class RoutingPool:
    """The choices (see ``megavlm.runtime.routing``) of the layers of this rank, [slots, layers here, top_k].

    With sequence parallelism a rank routes only its slice of a row; the others' tokens are 0 here. There is a place for
    every slot from the beginning: a token's choice takes less than a hundredth of its keys and values.

    Args:
        view: the model, see ``sampling_view``.
        blocks: the memory for keys and values.
    """

    def __init__(self, view: VLM, blocks: Blocks) -> None:
        moe = view.shapes.text.moe
        assert moe is not None, "only a mixture of experts has routers"
        assert not view.decoder_config.moe_router_fusion, "Megatron's fused router cannot be asked for its choice"
        self._group, self._depth = view.groups.model_parallel_host, view.shapes.text.layers
        tensor = view.groups.language.tp
        is_cut = view.parallel.sequence_parallel
        self._slices: int = tensor.size() if is_cut else 1
        self._slice: int = tensor.rank() if is_cut else 0
        self._is_copy = self._slices == 1 and tensor.rank() > 0
        self._layers = [layer.layer_number - 1 for chunk in view.language for layer in chunk.decoder.layers]
        dtype = torch.uint8 if moe.num_experts < 256 else torch.int16
        shape = blocks.count * BLOCK_TOKENS, len(self._layers), moe.top_k
        self._pool = torch.zeros(shape, dtype=dtype, device=device())

    def recorder(self, slots: Tensor, width: int) -> "Recorder":
        """Makes the ``Routing`` of a row of ``width`` tokens, of which the first n have these slots, int64 [n]."""
        self._pool[slots] = 0  # what was here before
        share = width // self._slices
        mine = slots[self._slice * share : (self._slice + 1) * share]
        return Recorder(self._pool, mine, {layer + 1: column for column, layer in enumerate(self._layers)})

    def keep(self, answers: Sequence[Growing], done: Sequence[OpenPrompt]) -> None:
        """Sets ``routing`` of those answers that are finished, and of prompts of which all are.

        Call it on all ranks of the sampling group, with the same arguments. On the leader the choices of all layers and
        tokens arrive when all answers to a prompt are finished.
        """
        for answer in answers:
            if answer.finish is not None:
                slots = answer.slots[: len(answer.tokens) - 1] if answer.slots is not None else np.empty(0, np.int64)
                # the model has not read the last token
                answer.routing = torch.nn.functional.pad(self._at(slots), (0, 0, 0, 0, 0, 1))
        for asked in done:
            asked.routing = self._at(asked.slots)
        if not done:
            return
        holders: list[OpenPrompt | Growing] = []
        for asked in done:
            holders += [asked, *asked.answers]
        mine = None if self._is_copy else (self._layers, [holder.routing for holder in holders])
        for holder in holders:
            assert holder.routing is not None, "all are finished"
            holder.routing = holder.routing.new_zeros(len(holder.routing), self._depth, self._pool.shape[2])
        for layers, parts in filter(None, gather_objects(mine, self._group)):
            for holder, part in zip(holders, parts, strict=True):
                assert holder.routing is not None, "all are finished"
                assert part is not None, "on all ranks"
                holder.routing[:, layers] += part

    def _at(self, slots: np.ndarray) -> Tensor:
        """A copy of some slots in host memory."""
        return self._pool[to_device(torch.from_numpy(slots), self._pool.device)].cpu()


class Recorder:
    """The ``Routing`` of a row of sampling.

    Args:
        pool: where choices go.
        slots: int64 [n], the slots of the first tokens of this rank's slice; the others are padding.
        columns: the column of each layer (from 1).
    """

    def __init__(self, pool: Tensor, slots: Tensor, columns: dict[int, int]) -> None:
        self._pool, self._slots, self._columns = pool, slots, columns

    def of_layer(self, layer: int) -> "_RecordedLayer":
        return _RecordedLayer(self._pool[:, self._columns[layer]], self._slots)


class _RecordedLayer:
    """Takes the place of Megatron's ``RouterReplay``."""

    def __init__(self, pool: Tensor, slots: Tensor) -> None:
        self._pool, self._slots = pool, slots

    def get_replay_topk(
        self, scores: Tensor, topk: int, num_groups: int | None, group_topk: int | None, choose: Choose
    ) -> tuple[Tensor, Tensor]:
        values, experts = choose(scores, topk, num_groups=num_groups, group_topk=group_topk)
        self._pool[self._slots] = (experts[: len(self._slots)] + 1).to(self._pool.dtype)
        return values, experts
