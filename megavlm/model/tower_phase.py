"""The tower's phase of a step: encode frames before the decoder's schedule, and run the tower's backward pass after it.

Every frame of a window of micro-batches is encoded exactly once in the group of ranks that share the frames. An
all-to-all sends the features directly to the ranks, stages and slices of the row that use them, and returns their
gradients. No pipeline stage contains the tower, so deepstack works with any split of the decoder's layers.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor

from megavlm.layout.frame_balance import Exchange, RankShare
from megavlm.model.projector import Projector
from megavlm.model.vision import Frames, VisionTower
from megavlm.platform import device

Timer = Callable[[], AbstractContextManager[None]]


class TowerPhase:
    """Runs tower and projector on the frames of this rank.

    Args:
        vision, projector: the modules. Parameters that do not require gradients are frozen; this may change later.
        group: ranks that share the frames of a window.
        shares: what each of these ranks needs.
        recompute: whether to encode without keeping activations, and again in ``backward``.
        chunk_patches: maximum number of patches encoded at a time; a larger frame is a chunk of its own.
        offload: whether features that wait for the decoder, and pixels that wait for recomputation, are in host memory.

    Attributes:
        frames_encoded: number of frames that this rank has encoded, without recomputation. It may be reset at any time.
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
    ) -> None:
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
        self._chunks: list[Frames] = []
        self._outputs: list[Tensor | None] = []
        self._features: list[Tensor] = []

    @property
    def _vision_is_trained(self) -> bool:
        return any(p.requires_grad for p in self.vision.parameters())

    @property
    def is_trained(self) -> bool:
        """Whether a weight of tower or projector is trained now."""
        return self._vision_is_trained or any(p.requires_grad for p in self.projector.parameters())

    def encode(self, frames: Frames, exchange: Exchange, timer: Timer = nullcontext) -> list[tuple[Tensor, Tensor]]:
        """Encodes this rank's frames and returns the features of each micro-batch that this rank needs.

        Args:
            frames: the frames that this rank encodes, on the device.
            exchange: the exchange of features between the ranks.
            timer: a context manager around the work of this rank that does not wait for other ranks.

        Returns:
            For each micro-batch (positions int64 [n], features [planes, n, hidden]), where ``planes`` are those of
            this rank's share. If tower or projector is trained, the features are leaves whose ``grad`` the decoder's
            backward pass fills. With ``offload``, the features and their gradients are in host memory.
        """
        self._chunks, self._outputs, self._features = _chunks(frames, self.chunk_patches), [], []
        self.frames_encoded += frames.num_new
        training = self.is_trained and torch.is_grad_enabled()
        with timer(), torch.set_grad_enabled(training and not self.recompute):
            outputs = [self._encode(chunk) for chunk in self._chunks]
        empty = torch.empty(self.num_planes, 0, self.hidden, device=device(), dtype=self._dtype)
        own = torch.cat([empty, *(output.detach() for output in outputs)], dim=1)
        self._outputs = [*outputs]
        del outputs  # or it would keep them alive when they are dropped below and in ``backward``
        received = self._all_to_all(own.view(-1, self.hidden)[exchange.send], exchange)
        features = [received[index].to(self.waiting_device).requires_grad_(training) for index in exchange.take]
        if not training:  # nothing is kept for ``backward``: an evaluation leaves no memory behind
            self._chunks, self._outputs = [], []
        else:
            self._exchange, self._features = exchange, features
            if self.recompute:
                self._outputs = []
                self._chunks = [chunk.to(self.waiting_device) for chunk in self._chunks]
        return list(zip(exchange.positions, features, strict=True))

    def backward(self, scale: float, timer: Timer = nullcontext) -> None:
        """Returns the features' gradients, times ``scale``, to the ranks that encoded the frames, and runs backward.

        Autograd puts the parameters' gradients into the main gradients of the modules' DDP wrappers.
        """
        if not self.is_trained:
            return
        grad = self._return_gradients().mul_(scale)  # [num_planes, N_own, hidden]
        with timer():
            start = 0
            for index, chunk in enumerate(self._chunks):
                output = self._encode(chunk.to(grad.device)) if self.recompute else self._outputs[index]
                assert output is not None
                end = start + output.shape[1]
                torch.autograd.backward(output, grad[:, start:end])
                if not self.recompute:
                    self._outputs[index] = None  # the graph is used up, so its memory can be freed
                start = end
        self._chunks, self._outputs, self._features = [], [], []

    def _encode(self, chunk: Frames) -> Tensor:
        """The features of a chunk, [num_planes, N, hidden]."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._vision_is_trained):
            hidden = chunk.through(self.vision)
        if not self._vision_is_trained:
            hidden = [h.detach() for h in hidden]  # Megatron's bias-dropout-add enables gradients for its biases
        return self.projector(hidden)

    def _return_gradients(self) -> Tensor:
        """The gradient of this rank's features, summed over the ranks that used them: [num_planes, N_own, hidden]."""
        exchange = self._exchange
        used = torch.zeros(sum(exchange.receive_counts), self.hidden, device=device(), dtype=self._dtype)
        if self.share.gives_gradient:
            for index, features in zip(exchange.take, self._features, strict=True):
                if features.grad is not None:
                    grad = features.grad.to(used.device, non_blocking=True)
                    used.index_copy_(0, index.flatten(), grad.reshape(-1, self.hidden))
        own = torch.zeros(self.num_planes * exchange.num_own, self.hidden, device=device(), dtype=self._dtype)
        own.index_add_(0, exchange.send, self._all_to_all(used, exchange, back=True))
        return own.view(self.num_planes, exchange.num_own, self.hidden)

    def _all_to_all(self, sent: Tensor, exchange: Exchange, *, back: bool = False) -> Tensor:
        """Sends features [S, hidden] to the ranks that need them, or with ``back`` gradients to the features' ranks."""
        if self.group.size() == 1:
            return sent
        going, coming = exchange.send_counts, exchange.receive_counts
        if back:
            going, coming = coming, going
        out = sent.new_empty(sum(coming), self.hidden)
        dist.all_to_all_single(out, sent, coming, going, group=self.group)
        return out


def _chunks(frames: Frames, chunk_patches: int) -> list[Frames]:
    """Splits frames into chunks of at most ``chunk_patches`` patches. Frames are never cut."""
    chunks: list[Frames] = []
    lengths: list[int] = []
    start, size = 0, 0

    def close() -> None:
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
