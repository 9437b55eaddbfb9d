"""Adapters on a model: put on, given their first values, and told apart from the rest in checkpoints."""

from collections.abc import Iterator
from functools import partial
from itertools import groupby

import torch
from torch import Tensor, nn

from megavlm.adapters.fourier import Fourier
from megavlm.adapters.linear_adapter import LinearAdapter
from megavlm.adapters.lora import Dora, Lora
from megavlm.adapters.nf4 import quantize
from megavlm.adapters.sites import AdapterSite, adapter_sites
from megavlm.config.adapter_section import AdapterSettings
from megavlm.convert.adapter import Adapter
from megavlm.convert.peft_names import part_of, targeted
from megavlm.model.vlm import VLM

TYPES = {"lora": Lora, "dora": Dora, "fourierft": Fourier}


class AdapterList(nn.ModuleList):
    """The adapters of a decoder chunk, of the tower or of the projector, as its child ``adapters``."""

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        entries = {}
        for number, adapter in enumerate(self):
            entries |= adapter.sharded_state_dict(f"{prefix}{number}.", sharded_offsets, metadata)
        return entries


class Adapters:
    """The adapters of a model on this rank. Made once, right after the model; parts that have any are frozen otherwise.

    Attributes:
        settings: of the adapters. parts: where there are any, of "vision", "projector", "language".
        linears: of the decoder, which ``quantize`` puts into 4 bits.
    """

    def __init__(self, vlm: VLM, settings: AdapterSettings):
        self.vlm, self.settings = vlm, settings
        targets = targeted(settings, vlm.shapes)
        self.parts = parts = {part_of(name) for name in targets}
        head = [chunk.score_head for chunk in vlm.language if hasattr(chunk, "score_head")]
        for module in (module for part in parts for module in vlm.modules_of(part)):
            module.requires_grad_(False)
        for module in head:
            module.requires_grad_(True)
        self.linears: list[nn.Module] = []
        make, dtype = TYPES[settings.type], vlm.decoder_config.params_dtype
        by_linear = groupby(adapter_sites(vlm), key=lambda site: id(site.linear))
        for sites in [list(group) for _, group in by_linear]:
            self.linears += [sites[0].linear] if sites[0].root in vlm.language else []
            if any(name.removesuffix(".weight") in targets for name in sites[0].entry.hf):
                self._put_on(sites, [make(site, settings, targets, dtype) for site in sites])
        for chunk in vlm.language:
            chunk.inputs_need_grad = "language" in parts

    def _put_on(self, sites: list[AdapterSite], adapters: list[LinearAdapter]) -> None:
        """``sites``: of one module; several where it multiplies its experts in groups."""
        root, linear = sites[0].root, sites[0].linear
        if not hasattr(root, "adapters"):
            root.adapters = AdapterList()
        root.adapters.extend(adapters)

        linear.register_forward_hook(partial(adapted, adapters))

    @property
    def adapters(self) -> Iterator[LinearAdapter]:
        """All adapters on this rank."""
        roots = [*self.vlm.language, self.vlm.vision, self.vlm.projector]
        return (adapter for root in roots for adapter in getattr(root, "adapters", ()))

    def begin(self, source: Adapter | None, seed: int) -> None:
        """First values, from ``source`` or fresh ones that change nothing; call it when the base has its weights.

        With ``quantize`` the decoder's linears go into 4 bits first: fresh values start from what they became.
        """
        if self.settings.quantize:
            for linear in self.linears:
                quantize(linear, double=self.settings.quantize == "nf4_double")
        for adapter in self.adapters:
            adapter.begin(source.read if source is not None else None, seed)


def adapted(adapters: list[LinearAdapter], linear: nn.Module, args: tuple, output: Tensor | tuple):
    """The forward hook of a linear: what it gives with its adapters instead of ``output``.

    Args:
        adapters: one; or those of the experts whose tokens, of lengths ``args[1]``, a grouped linear multiplies.
    """
    product, *rest = output if isinstance(output, tuple) else (output,)
    if len(adapters) == 1:
        product = adapters[0](linear, args[0], product)
    else:
        lengths = list(args[1])
        pieces = zip(adapters, args[0].split(lengths), product.split(lengths), strict=True)
        product = torch.cat([adapter(linear, inputs, out) for adapter, inputs, out in pieces])
    return (product, *rest) if isinstance(output, tuple) else product


def learned(shards: dict) -> dict:
    """The entries of a sharded state that are of parameters that learn: what a checkpoint with adapters holds."""
    return {
        name: entry for name, entry in shards.items() if isinstance(entry.data, Tensor) and entry.data.requires_grad
    }
