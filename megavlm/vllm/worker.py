"""Our transport of weights in vLLM's workers, registered as an engine of its weight-transfer interface.

It runs in every worker process of a server, which imports it as ``worker_extension_cls``. A bucket comes as a file of
safetensors in host memory, which works on a CPU and on a GPU. vLLM's layerwise reload puts the tensors of a bucket in
their place: plain loading fails where a platform has repacked its weights, as on a CPU.
"""

import os
import signal
import threading
from dataclasses import dataclass
from typing import Any

from safetensors.torch import load_file
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from megavlm.base.processes import wait_for_end
from megavlm.runtime.digest import digest
from megavlm.vllm.wire import SERVER, TRANSPORT

_PARENT = os.getppid()  # vLLM's engine, or the server if the engine has the worker in its own process


@dataclass
class NoInit(WeightTransferInitInfo):
    """Nothing has to be set up."""


@dataclass
class Bucket(WeightTransferUpdateInfo):
    """A file of safetensors with some of the weights, under their Hugging Face names."""

    path: str


class FileTransfer(WeightTransferEngine[NoInit, Bucket]):
    """Loads buckets from files, and keeps the digest of every tensor until it is asked for."""

    init_info_cls, update_info_cls = NoInit, Bucket
    digests: dict[str, int]
    missing: set[str]
    wrapped: set[str]

    def init_transfer_engine(self, init_info: NoInit) -> None:
        """Does nothing."""

    def start_weight_update(self) -> None:
        self.digests, self.missing = {}, {_reported(name) for name, _ in self.model.named_parameters()}
        self.wrapped = _wrapped(self.model)
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """As the base class, but it waits for no accelerator: what it reads is in host memory."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: Bucket) -> None:
        tensors = load_file(update_info.path)
        self.digests |= {name: digest(tensor) for name, tensor in tensors.items()}
        named = ((_beside_adapter(name, self.wrapped), tensor.to(self.device)) for name, tensor in tensors.items())
        loaded = self.model.load_weights(named)
        self.missing -= loaded or set()

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Does nothing."""

    @staticmethod
    def trainer_send_weights(iterator: Any, trainer_args: Any) -> None:
        """Not used: the trainer sends buckets over HTTP."""
        raise NotImplementedError


def _reported(parameter: str) -> str:
    """The name under which vLLM's model reports that it has loaded a parameter."""
    return parameter.replace(".experts.routed_experts.", ".experts.")


def _wrapped(model: Any) -> set[str]:
    """The ends of Hugging Face's names of the linear layers that vLLM has wrapped to apply adapters."""
    ends = {name.rpartition(".")[2] for name, module in model.named_modules() if hasattr(module, "base_layer")}
    return {part for end in ends for part in model.packed_modules_mapping.get(end, [end])}


def _beside_adapter(name: str, wrapped: set[str]) -> str:
    """Hugging Face's name of a weight, as vLLM's loader finds it where the layer is wrapped."""
    module, _, kind = name.rpartition(".")
    is_wrapped = name.startswith("model.language_model.") and module.rpartition(".")[2] in wrapped
    return f"{module}.base_layer.{kind}" if is_wrapped else name


class Extension:
    """Methods that every worker of vLLM gets besides its own."""

    def megavlm_received(self) -> dict[str, Any]:
        """What has come since the start of the update: "digests" by name, and "missing" parameters."""
        engine = self.weight_transfer_engine  # type: ignore[attr-defined]  # of the worker
        return {"digests": engine.digests, "missing": sorted(engine.missing)}


def _end_with(server: int) -> None:
    """Ends the processes of a server soon after it has ended, even if it was killed; those of vLLM would go on."""
    try:
        wait_for_end(server)
        if os.getppid() == _PARENT != server:  # not whoever adopts the children of a server that has ended
            os.kill(_PARENT, signal.SIGKILL)
    finally:
        os._exit(1)


WeightTransferEngineFactory.register_engine(TRANSPORT, FileTransfer)
threading.Thread(target=_end_with, args=(int(os.environ[SERVER]),), daemon=True).start()
