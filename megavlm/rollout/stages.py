"""The pipeline stages while sampling: hidden states go from stage to stage, and tokens from the last one to all.

Megatron's schedule passes micro-batches that are known beforehand; here a row is made of tokens that the last stage has
chosen. All stages go through the same sequence of operations, so each knows the shape of what it receives.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from megavlm.model.vlm import VLM
from megavlm.platform import device, to_device
from megavlm.rollout.answers import Growing, OpenPrompt
from megavlm.rollout.engine import Sampling
from megavlm.rollout.rows import Operation
from megavlm.rollout.sampling import draw, uniforms
from megavlm.rollout.timing import Timer
from megavlm.runtime.forward import feature_planes


class Stages:
    """Runs the chunks of this stage.

    Args:
        view: the model, see ``sampling_view``.
        sampling: how tokens are chosen.
        chunk_tokens: number of tokens whose logits exist at a time.
        timer: makes a context manager around the part of the work that its argument names.
    """

    def __init__(self, view: VLM, sampling: Sampling, chunk_tokens: int, timer: Timer) -> None:
        self._view, self._sampling, self._chunk_tokens, self._timer = view, sampling, chunk_tokens, timer
        self._group = view.groups.language.pp
        self._host, self._tensor = view.groups.model_parallel_host, view.groups.language.tp
        self._sent: dict[tuple, tuple[dist.Work, Tensor]] = {}
        self.is_last = self._group.rank() == self._group.size() - 1

    @property
    def count(self) -> int:
        """Number of stages."""
        return self._group.size()

    def run(self, number: int, group: int, operation: Operation) -> None:
        """Runs one chunk of this stage, and after the last chunk draws tokens.

        Args:
            number: index of the chunk on this stage.
            group: number of the group of sequences.
            operation: the row.
        """
        chunk = self._view.language[number]
        if not chunk.pre_process:
            chunk.set_input_tensor(self._receive_hidden(operation))
        visual, deepstack = None, None
        if operation.micro_batch is not None:
            visual, deepstack = feature_planes(self._view, chunk, operation.micro_batch)
        with self._timer("decoding" if operation.micro_batch is None else "prefill"):
            hidden = chunk(
                operation.input_ids, operation.position_ids, operation.row, visual=visual, deepstack=deepstack
            )
        if not chunk.post_process:
            if self.is_last:
                self._send(("hidden", number, group), hidden.cpu(), self._host, self._rank_of(0))
            else:
                self._send(("hidden", number, group), hidden, self._group, self._group.rank() + 1)
            return
        if not operation.draws:
            return
        with self._timer("sampling"):
            operation.drawn = self._draw(hidden, operation)
        for stage in range(self._group.size() - 1):
            self._send(("tokens", stage, group), operation.drawn, self._host, self._rank_of(stage))

    def drawn(self, operation: Operation) -> list[tuple[OpenPrompt, Growing, int, tuple[float, float, float]]]:
        """The tokens of an operation whose last chunk has run, with their log-probabilities, on every stage."""
        if not operation.draws:
            return []
        values = operation.drawn
        if values is None:
            values = torch.empty(4, len(operation.draws), dtype=torch.float64)
            dist.recv(values, group=self._host, group_src=self._rank_of(self._group.size() - 1))
        return [
            (asked, answer, int(token), (logprob, policy, sampled))
            for (asked, answer), (token, logprob, policy, sampled) in zip(
                operation.draws, values.t().tolist(), strict=True
            )
        ]

    def finish(self) -> None:
        """Waits until everything has been sent."""
        for work, _ in self._sent.values():
            work.wait()
        self._sent = {}

    def _draw(self, hidden: Tensor, operation: Operation) -> Tensor:
        """float64 [4, draws] on the host; a float64 holds tokens and float32 numbers exactly."""
        model = next(chunk for chunk in self._view.language if chunk.post_process)
        seeds = [answer.seed for _, answer in operation.draws]
        chance = to_device(uniforms(seeds, [len(answer.tokens) for _, answer in operation.draws]), device())
        parts = []
        for start in range(0, len(seeds), self._chunk_tokens):
            part = slice(start, start + self._chunk_tokens)
            found = draw(model.logits(hidden, operation.positions[part]), self._sampling, chance[part])
            values = (found.tokens, found.logprobs, found.policy_logprobs, found.sampled_logprobs)
            parts.append(torch.stack([value.double() for value in values]))
        return torch.cat(parts, dim=1).cpu()

    def _receive_hidden(self, operation: Operation) -> Tensor:
        """The hidden states of the chunk before. With virtual stages they come from the last stage to the first.

        These go over the host network: with two stages there would otherwise be messages in both directions between
        the same two devices, which NCCL handles in one order, and each stage could wait for the other.
        """
        config, rank = self._view.decoder_config, self._group.rank()
        slices = self._view.parallel.tensor if config.sequence_parallel else 1
        shape = operation.width // slices, 1, config.hidden_size
        hidden = torch.empty(shape, dtype=config.pipeline_dtype, device=device() if rank else "cpu")
        if rank:
            dist.recv(hidden, group=self._group, group_src=rank - 1)
        else:
            dist.recv(hidden, group=self._host, group_src=self._rank_of(self._group.size() - 1))
        return hidden if rank else to_device(hidden, device())

    def _rank_of(self, stage: int) -> int:
        """The rank of another stage with the same tensor index; ranks count tensor fastest."""
        return stage * self._tensor.size() + self._tensor.rank()

    def _send(self, key: tuple, tensor: Tensor, group: dist.ProcessGroup, to: int) -> None:
        """Sends without waiting. What was sent before under the same key has long been used."""
        if key in self._sent:
            self._sent.pop(key)[0].wait()
        tensor = tensor.contiguous()
        work = dist.isend(tensor, group=group, group_dst=to)
        assert work is not None
        self._sent[key] = work, tensor
