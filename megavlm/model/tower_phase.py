"""The tower's phase of a step: encode dealt frames before the decoder's schedule, walk back through them after it.

Every frame of a window of micro-batches is encoded exactly once in the group of ranks that share it. The features go by
all-to-all straight to the rank, stage and slice of the row that uses them, and their gradients come back the same way,
so no pipeline stage contains the tower and any split of the decoder's layers works with deepstack.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor

from megavlm.model.frame_balance import Exchange, RankShare
from megavlm.model.projector import Projector
from megavlm.model.vision import Frames, VisionTower
from megavlm.platform import device

Timer = Callable[[], AbstractContextManager[None]]


class TowerPhase:
    """Runs tower and projector over the frames dealt to this rank.

    Args:
        vision, projector: the modules; parameters that do not require grad are frozen, as long as that is so.
        group: ranks that share the window's frames.
        shares: what each of them needs.
        recompute: encode without keeping activations, and again in ``backward``.
        chunk_patches: most patches encoded at a time; a larger frame is a chunk of its own.
        offload: features that wait for the decoder, and pixels that wait to be encoded again, are in host memory.
    Attributes:
        frames_encoded: frames that this rank has run through the tower (recomputing not counted); reset it at will.
    """

    def __init__(
        self,
        vision: VisionTower,
        projector: Projector,
        group: dist.ProcessGroup,
        shares: list[RankShare],
        *,
        recompute: bool,
        chunk_patches: int,
        offload: bool = False,
    ):
        self.vision, self.projector = vision, projector
        self.group, self.shares = group, shares
        self.share = shares[group.rank()]
        self.recompute, self.chunk_patches = recompute, chunk_patches
        self.waiting_device = torch.device("cpu") if offload else device()
        self.frames_encoded = 0
        self.num_planes = 1 + len(vision.taps)
        self.hidden = projector.merger.linear_fc2.out_features
        self._dtype = projector.merger.linear_fc2.weight.dtype
        self.merge = projector.merger.joined // vision.patch_embed.out_features

    @property
    def _vision_learns(self) -> bool:
        return any(p.requires_grad for p in self.vision.parameters())

    @property
    def _learns(self) -> bool:
        return self._vision_learns or any(p.requires_grad for p in self.projector.parameters())

    def encode(self, frames: Frames, exchange: Exchange, timer: Timer = nullcontext) -> list[tuple[Tensor, Tensor]]:
        """Features of each micro-batch of the window, for this rank.

        Args:
            frames: the frames dealt to this rank, on the device.
            timer: a context manager around what this rank computes without waiting for others.
        Returns:
            per micro-batch (positions int64 [n], features [planes, n, hidden]); the features are leaves whose ``grad``
            the decoder's backward fills, if anything in the tower learns; with ``offload`` they are in host memory, and
            so their gradients return to it. ``planes`` are those of this rank's share of the features.
        """
        self._exchange, self._chunks, self._outputs = exchange, _chunks(frames, self.chunk_patches), []
        self.frames_encoded += len(frames.lengths)
        learning = self._learns and torch.is_grad_enabled()
        with timer(), torch.set_grad_enabled(learning and not self.recompute):
            self._outputs = [self._encode(chunk) for chunk in self._chunks]
        empty = torch.empty(self.num_planes, 0, self.hidden, device=device(), dtype=self._dtype)
        own = torch.cat([empty, *(output.detach() for output in self._outputs)], dim=1)
        received = self._all_to_all(own.view(-1, self.hidden)[exchange.send])
        if not learning:
            self._chunks, self._outputs = [], []
        elif self.recompute:
            self._outputs = []
            self._chunks = [chunk.to(self.waiting_device) for chunk in self._chunks]
        self._features = [received[index].to(self.waiting_device).requires_grad_(learning) for index in exchange.take]
        return list(zip(exchange.positions, self._features, strict=True))

    def backward(self, scale: float, timer: Timer = nullcontext) -> None:
        """Sends the features' gradients, times ``scale``, to the frames' owners and walks back through the tower.

        Parameter gradients go where autograd puts them: into the main gradients of the modules' DDP wrappers.
        """
        if not self._learns:
            self._features = []
            return
        grad = self._return_gradients().mul_(scale)  # [num_planes, N_own, hidden]
        with timer():
            start = 0
            for index, chunk in enumerate(self._chunks):
                output = self._encode(chunk.to(grad.device)) if self.recompute else self._outputs[index]
                end = start + output.shape[1]
                torch.autograd.backward(output, grad[:, start:end])
                if not self.recompute:
                    self._outputs[index] = None  # its graph is spent; the caching allocator can have the memory now
                start = end
        self._chunks, self._outputs, self._features = [], [], []

    def _encode(self, chunk: Frames) -> Tensor:
        """[num_planes, N, hidden] of a chunk."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._vision_learns):
            hidden = self.vision(chunk)
        if not self._vision_learns:
            hidden = [h.detach() for h in hidden]  # Megatron's bias-dropout-add enables grad for its biases
        return self.projector(hidden)

    def _return_gradients(self) -> Tensor:
        """Gradient of this rank's own features, summed over the ranks that used them: [num_planes, N_own, hidden]."""
        exchange = self._exchange
        used = torch.zeros(sum(exchange.receive_counts), self.hidden, device=device(), dtype=self._dtype)
        if self.share.gives_gradient:
            for index, features in zip(exchange.take, self._features, strict=True):
                if features.grad is not None:
                    grad = features.grad.to(used.device, non_blocking=True)
                    used.index_copy_(0, index.flatten(), grad.reshape(-1, self.hidden))
        own = torch.zeros(self.num_planes * exchange.num_own, self.hidden, device=device(), dtype=self._dtype)
        own.index_add_(0, exchange.send, self._all_to_all(used, back=True))
        return own.view(self.num_planes, exchange.num_own, self.hidden)

    def _all_to_all(self, sent: Tensor, *, back: bool = False) -> Tensor:
        """What the exchange sends, [S, hidden], delivered; or, ``back``, what came, returned to where it was from."""
        if self.group.size() == 1:
            return sent
        going, coming = self._exchange.send_counts, self._exchange.receive_counts
        if back:
            going, coming = coming, going
        out = sent.new_empty(sum(coming), self.hidden)
        dist.all_to_all_single(out, sent, coming, going, group=self.group)
        return out


def _chunks(frames: Frames, chunk_patches: int) -> list[Frames]:
    """Cuts frames into groups of at most ``chunk_patches`` patches; no frame is cut."""
    chunks, lengths, start, size = [], [], 0, 0

    def close():
        nonlocal lengths, start, size
        if lengths:
            part = slice(start, start + size)
            chunks.append(frames.slice(part, lengths))
        start, lengths, size = start + size, [], 0

    for length in frames.lengths:
        if size and size + length > chunk_patches:
            close()
        lengths.append(length)
        size += length
    close()
    return chunks
