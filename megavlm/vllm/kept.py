"""The current weights in files, from which a server gets them, also one that is started again later."""

import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from megavlm.runtime.digest import digest
from megavlm.vllm.client import Client

BUCKET = 2**28
"""Bytes that are gathered, written and sent at a time."""


@dataclass
class Kept:
    """Weights in files.

    Attributes:
        version: what the servers call them.
        folder: has the files.
        digests: of each tensor, by its Hugging Face name.
        num_bytes: size of all tensors.
    """

    version: str
    folder: Path
    digests: dict[str, int] = field(default_factory=dict)
    num_bytes: int = 0

    def write(self, buckets: Iterable[list[tuple[str, Tensor]]]) -> None:
        """Writes buckets of named tensors. An empty bucket is passed over."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        for number, bucket in enumerate(bucket for bucket in buckets if bucket):
            tensors = _apart(bucket)
            self.digests |= {name: digest(tensor) for name, tensor in tensors.items()}
            self.num_bytes += sum(tensor.nbytes for tensor in tensors.values())
            (self.folder / f"{number:05d}.safetensors").write_bytes(save(tensors))

    def send(self, client: Client, partial: str, seconds: float) -> None:
        """Gives them to a server, which compares all digests.

        Args:
            client: of the server.
            partial: what becomes of answers that it works on; see the setting rollout.partial.
            seconds: how long a single request may take.

        Raises:
            NotReady, TooSlow, Refused: as ``Client.post``. The server then has no weights.
        """
        client.post("/weights/start", {"partial": partial}, seconds)
        for file in sorted(self.folder.glob("*.safetensors")):
            client.post("/weights/bucket", file.read_bytes(), seconds)
        client.post("/weights/finish", {"version": self.version, "digests": self.digests}, seconds)

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
