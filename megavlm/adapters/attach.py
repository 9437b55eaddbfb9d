"""Attaches adapters to a model, initialises them, and selects the trainable parameters for checkpoints."""

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
from megavlm.convert import SHARDED_METADATA
from megavlm.convert.adapter import Adapter
from megavlm.convert.peft_names import part_of, saved_whole, targeted
from megavlm.model.layers import Router
from megavlm.model.vlm import VLM

TYPES = {"lora": Lora, "dora": Dora, "fourierft": Fourier}


class AdapterList(nn.ModuleList):
    """The adapters of a decoder chunk, of the tower or of the projector; it is the child module ``adapters`` there."""

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """The sharded entries of all adapters, as Megatron's modules return them."""
        entries: dict = {}
        for number, adapter in enumerate(self):
            assert isinstance(adapter, LinearAdapter)
            entries |= adapter.sharded_state_dict(f"{prefix}{number}.", sharded_offsets, metadata)
        return entries


class Adapters:
    """The adapters of a model on this rank. Create it once, right after the model.

    In parts of the model with adapters, all other weights are frozen, except the reward head and
    ``adapter.modules_to_save``.

    Attributes:
        settings: the ``adapter`` section.
        parts: the parts that have adapters, of "vision", "projector", "language".
        linears: the linear layers of the decoder, whose weights are stored in 4 bits with ``quantize``.
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
        if whole := saved_whole(settings, vlm.shapes):
            for shard in vlm.sharded_state_dict(dict(SHARDED_METADATA)).values():
                if getattr(shard, "key", None) in whole:
                    shard.data.requires_grad_(True)
        self.linears: list[nn.Module] = []
        assert settings.type is not None, "there are no adapters without adapter.type"
        make, dtype = TYPES[settings.type], vlm.decoder_config.params_dtype
        by_linear = groupby(adapter_sites(vlm), key=lambda site: id(site.linear))
        for sites in [list(group) for _, group in by_linear]:
            self.linears += [sites[0].linear] if sites[0].root in vlm.language else []
            if any(name.removesuffix(".weight") in targets for name in sites[0].entry.hf):
                self._put_on(sites, [make(site, settings, targets, dtype) for site in sites])
        for chunk in vlm.language:
            chunk.inputs_need_grad = "language" in parts
            for router in (module for module in chunk.modules() if isinstance(module, Router)):
                router.adapters_are_trained = "language" in parts

    def _put_on(self, sites: list[AdapterSite], adapters: list[LinearAdapter]) -> None:
        """Attach adapters to one module. It has several sites if it is a grouped linear layer for several experts."""
        root, linear = sites[0].root, sites[0].linear
        if not hasattr(root, "adapters"):
            root.adapters = AdapterList()
        attached = root.adapters
        assert isinstance(attached, AdapterList)
        attached.extend(adapters)
        linear.register_forward_hook(partial(adapted, adapters))

    @property
    def adapters(self) -> Iterator[LinearAdapter]:
        """All adapters on this rank."""
        roots = [*self.vlm.language, self.vlm.vision, self.vlm.projector]
        return (adapter for root in roots for adapter in getattr(root, "adapters", ()))

    def begin(self, source: Adapter | None, seed: int) -> None:
        """Load the adapters from ``source``, or initialise them such that they do not change the model's output.

        Call it after the base weights have been loaded. With ``quantize``, the decoder's linear layers are quantized
        first, so that the initial values are computed from the quantized weights.
        """
        if self.settings.quantize:
            for linear in (one for one in self.linears if getattr(one, "nf4", None) is None):
                quantize(linear, double=self.settings.quantize == "nf4_double")
        for adapter in self.adapters:
            adapter.begin(source.read if source is not None else None, seed)


def adapted(adapters: list[LinearAdapter], linear: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple:
    """The forward hook of a linear layer: replaces its output by the output with adapters.

    Args:
        adapters: a single adapter; for a grouped linear layer, the adapters of its experts in order.
        linear: the layer.
        args: its inputs; for a grouped linear layer, ``args[1]`` has the number of tokens of each expert.
        output: its output, or a tuple whose first item is the output.
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
    """The entries of a sharded state that belong to trainable parameters: the contents of an adapter checkpoint."""
    return {
        name: entry for name, entry in shards.items() if isinstance(entry.data, Tensor) and entry.data.requires_grad
    }
