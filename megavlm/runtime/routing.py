"""Routing replay: updates send each token to the experts to which it went while its answer was sampled.

Sampler and trainer add in another order. Where two experts are almost equally likely, the roundings decide, and another
expert changes the log-probability of a token far more than the roundings do. The choice is therefore kept with the
tokens. The weights of the chosen experts are computed anew, with gradients.

A choice is a tensor [tokens, layers, top_k] of expert + 1; 0 stands for an expert that is not known. Layers are counted
over the whole decoder.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from megavlm.data.row import Row
from megavlm.platform import to_device

Choose = Callable[..., tuple[Tensor, Tensor]]
"""Megatron's choice: (scores [t, experts], top_k, num_groups=, group_topk=) -> scores and experts, both [t, top_k]."""

_is_prescribed = True


@contextmanager
def chosen_anew() -> Iterator[None]:
    """Within the block routers choose for themselves; for forward passes of other weights, such as the reference."""
    global _is_prescribed
    _is_prescribed = False
    try:
        yield
    finally:
        _is_prescribed = True


class Prescribed:
    """The ``Routing`` of a row whose experts are known.

    Args:
        choice: of this rank's tokens, on the device.
    """

    def __init__(self, choice: Tensor):
        self.choice = choice

    def of_layer(self, layer: int) -> "_PrescribedLayer | None":
        return _PrescribedLayer(self.choice[:, layer - 1]) if _is_prescribed else None


class _PrescribedLayer:
    """Takes the place of Megatron's ``RouterReplay``, which knows one row at a time and no unknown experts."""

    def __init__(self, choice: Tensor):
        self._choice = choice

    def get_replay_topk(
        self, scores: Tensor, topk: int, num_groups: int | None, group_topk: int | None, choose: Choose
    ) -> tuple[Tensor, Tensor]:
        _, anew = choose(scores, topk, num_groups=num_groups, group_topk=group_topk)
        experts = torch.where(self._choice > 0, self._choice.long() - 1, anew)
        return scores.gather(1, experts), experts


def routing_of(row: Row, tokens: Tensor, where: torch.device) -> Prescribed | None:
    """The experts of some tokens of a row, if those of any sample are known.

    Args:
        row: the row.
        tokens: int64 [t], their positions in the row.
        where: the device of the result.
    """
    known = [one.sampled.routing if one.sampled is not None else None for one in row.annotations]
    first = next((parts for parts in known if parts is not None), None)
    if first is None:
        return None
    whole = first[0].new_zeros(len(row.input_ids), *first[0].shape[1:])
    for start, parts in zip(row.cu_seqlens.tolist(), known, strict=False):
        for part in parts or ():  # of the prompt, and of the answer
            whole[start : start + len(part)] = part
            start += len(part)
    return Prescribed(to_device(whole[tokens], where))
