"""The weights and the adapter of a server of vLLM; see ``server`` for the routes. Runs in the environment of vLLM."""

import asyncio
import json
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors.torch import load
from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest
from vllm.lora.request import LoRARequest
from vllm.v1.engine.async_llm import AsyncLLM

from megavlm.runtime.digest import digest
from megavlm.vllm.wire import folder_for, unpacked

_MEMORY = Path("/dev/shm")  # files here are in host memory, of which a container may have little (Docker: 64 MB)


class Again(Exception):
    """The request cannot be answered now."""


class ServerWeights:
    """Takes weights from the trainer. While an update is under way, nothing is sampled.

    Args:
        engine: the engine.

    Attributes:
        version: what the trainer calls the present weights; None: there are none, or an update is under way.
        adapter: what a prompt has to name so that the adapter is applied; None: there is none.
    """

    def __init__(self, engine: AsyncLLM):
        self._engine = engine
        self.version: str | None = None
        self.adapter: LoRARequest | None = None
        self._base: str | None = None  # the version of the weights to which an adapter is applied
        self._is_updating = False  # whether vLLM itself takes weights
        self._digests: dict[str, int] = {}  # of the adapter that has come in this update
        self._folder: tempfile.TemporaryDirectory | None = None  # of the present adapter: vLLM may look there again

    def present(self) -> str:
        """``version``. Raises Again if it is None."""
        if self.version is None:
            raise Again("it has no weights yet")
        return self.version

    async def start(self, told: dict[str, Any]) -> None:
        """Pauses sampling. ``told``: "partial", "weights" (whether they come), and "base" (their version otherwise)."""
        if not told["weights"] and told["base"] != self._base:
            raise Again("it does not have the weights for the adapter")
        self.version = None
        mode = "keep" if told["partial"] == "continue" else "abort"
        await self._engine.pause_generation(mode=mode, clear_cache=False)
        if self._is_updating:  # a trainer has ended in the middle of an update
            with suppress(Exception):  # or a part of it could not be loaded, which has ended it
                await self._engine.finish_weight_update()
        self._is_updating, self._digests = told["weights"], {}
        if self._is_updating:
            self._base = self.adapter = None
            await self._engine.start_weight_update()

    async def bucket(self, body: bytes) -> None:
        """Loads a file of safetensors."""
        if not self._is_updating:
            raise ValueError("no update of the weights has been started")
        with tempfile.NamedTemporaryFile(dir=folder_for(len(body), _MEMORY), suffix=".safetensors") as file:
            file.write(body)
            file.flush()
            await self._engine.update_weights(WeightTransferUpdateRequest(update_info={"path": file.name}))

    async def take_adapter(self, body: bytes) -> None:
        """Applies an adapter: a message with adapter_config.json and a file of safetensors."""
        if self._engine.vllm_config.lora_config is None:
            raise ValueError("it was started without adapters (enable_lora)")
        folder, self._digests = await asyncio.to_thread(_written, body)
        # In place: answers that are under way go on with it. A prompt must not ask for that, which would have the files
        # read again for each token.
        await self._engine.add_lora(LoRARequest("megavlm", 1, folder.name, load_inplace=True))
        self.adapter, self._folder = LoRARequest("megavlm", 1, folder.name), folder

    async def finish(self, told: dict[str, Any]) -> None:
        """Compares what has come with "digests" and "adapter", forgets what was computed before, and samples again.

        Raises:
            ValueError: something differs; there are no weights then.
        """
        problems = [_difference(told["adapter"], {"digests": self._digests, "missing": []})]
        were_updated, self._is_updating = self._is_updating, False
        if were_updated:
            received = await self._engine.collective_rpc("megavlm_received")
            problems += [_difference(told["digests"], one) for one in received]
            await self._engine.finish_weight_update()
        await self._engine.reset_prefix_cache(reset_running_requests=True)
        if were_updated:  # the tower has learnt, too
            await self._engine.reset_mm_cache()
            await self._engine.reset_encoder_cache()
        problem = next((text for text in problems if text), None)
        if problem is None:
            self.version, self._base = told["version"], told["base"]
        await self._engine.resume_generation()
        if problem is not None:
            raise ValueError(problem)


def _written(body: bytes) -> tuple[tempfile.TemporaryDirectory, dict[str, int]]:
    """An adapter in a folder of peft's format, and the digests of its tensors."""
    config, tensors = unpacked(body)
    folder = tempfile.TemporaryDirectory(dir=folder_for(len(body), _MEMORY))
    (Path(folder.name) / "adapter_config.json").write_text(json.dumps(config))
    (Path(folder.name) / "adapter_model.safetensors").write_bytes(tensors)
    return folder, {name: digest(tensor) for name, tensor in load(bytes(tensors)).items()}


def _difference(told: dict[str, int], received: dict[str, Any]) -> str | None:
    """What is wrong with the tensors that a worker has received; None: nothing."""
    got = received["digests"]
    absent, strange = sorted(told.keys() - got.keys()), sorted(got.keys() - told.keys())
    other = sorted(name for name in told.keys() & got.keys() if told[name] != got[name])
    found = [
        f"{len(names)} {what}: {', '.join(names[:5])}{', …' if len(names) > 5 else ''}"
        for what, names in (
            ("tensors did not arrive", absent),
            ("tensors arrived that the trainer does not know", strange),
            ("tensors arrived with other values", other),
            ("parameters of vLLM's model got no weights", received["missing"]),
        )
        if names
    ]
    return f"of {len(told)} tensors, " + "; ".join(found) if found else None
