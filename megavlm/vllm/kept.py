"""The current weights in files, from which a server gets them, also one that is started again later."""

import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from safetensors.torch import save
from torch import Tensor

from megavlm.runtime.digest import digest
from megavlm.vllm.client import Client
from megavlm.vllm.wire import packed

BUCKET = 2**28
"""Bytes that are gathered, written and sent at a time."""


@dataclass
class Kept:
    """Weights in files: those of the whole model, or an adapter, which is one file, for those of ``base``.

    Attributes:
        version: what the servers call them.
        folder: has the files.
        base: the weights of the model without the adapter; None: these are all weights of the model.
        config: adapter_config.json of the adapter.
        digests: of each tensor, by its Hugging Face name, or by that which peft gives it.
        num_bytes: size of all tensors.
    """

    version: str
    folder: Path
    base: Self | None = None
    config: dict[str, Any] = field(default_factory=dict)
    digests: dict[str, int] = field(default_factory=dict)
    num_bytes: int = 0

    def write(self, buckets: Iterable[list[tuple[str, Tensor]]]) -> None:
        """Writes buckets of named tensors, each to a file, or an adapter to one. An empty bucket is passed over."""
        if self.base is not None:
            buckets = [[(name, tensor.cpu()) for bucket in buckets for name, tensor in bucket]]
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        for number, bucket in enumerate(bucket for bucket in buckets if bucket):
            tensors = _apart(bucket)
            self.digests |= {name: digest(tensor) for name, tensor in tensors.items()}
            self.num_bytes += sum(tensor.nbytes for tensor in tensors.values())
            (self.folder / f"{number:05d}.safetensors").write_bytes(save(tensors))

    def send(self, client: Client, partial: str, seconds: float, *, has_base: bool = False) -> None:
        """Gives them to a server, which compares all digests.

        Args:
            client: of the server.
            partial: what becomes of answers that it works on; see the setting rollout.partial.
            seconds: how long a single request may take.
            has_base: whether the server has the weights of ``base`` already.

        Raises:
            NotReady, TooSlow, Refused: as ``Client.post``. The server then has no weights.
        """
        base = self.base.version if self.base is not None else None
        whole = None if has_base else self.base or self
        client.post("/weights/start", {"partial": partial, "weights": whole is not None, "base": base}, seconds)
        for file in whole.files if whole is not None else []:
            client.post("/weights/bucket", file.read_bytes(), seconds)
        for file in self.files if base is not None else []:
            client.post("/weights/adapter", packed(self.config, file.read_bytes()), seconds)
        digests = {
            "digests": whole.digests if whole is not None else {},
            "adapter": self.digests if base is not None else {},
        }
        client.post("/weights/finish", {"version": self.version, "base": base, **digests}, seconds)

    @property
    def files(self) -> list[Path]:
        """The files with tensors, in their order."""
        return sorted(self.folder.glob("*.safetensors"))

    def remove(self) -> None:
        """Deletes the files."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _apart(bucket: list[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors on the host, without shared memory, which a file of safetensors does not allow (tied weights)."""
    tensors: dict[str, Tensor] = {}
    storages = set[int]()
    for name, tensor in bucket:
        value = tensor.detach().cpu().contiguous()
        storage = value.untyped_storage().data_ptr()
        tensors[name] = value.clone() if storage in storages else value
        storages.add(storage)
    return tensors
