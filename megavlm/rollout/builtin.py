"""The built-in engine: samples in the training weights themselves, in the layout of training; nothing is converted."""

from collections.abc import Callable, Iterator, Sequence

from megavlm.base.stop_signals import StepLeft
from megavlm.model.vlm import VLM
from megavlm.platform.collectives import all_gather_objects
from megavlm.rollout.answers import Ending
from megavlm.rollout.engine import Answered, Prompt, Sampling
from megavlm.rollout.memory import Memory
from megavlm.rollout.rounds import Rounds
from megavlm.rollout.source import Dealt, PromptSource
from megavlm.rollout.stages import Stages
from megavlm.rollout.timing import Timer, untimed
from megavlm.rollout.view import sampling_view


class BuiltinEngine:
    """Samples with the weights of ``vlm``; see ``Engine``. Create it on all ranks.

    Tensor, pipeline and expert parallelism are those of the model; context-parallel ranks are further data-parallel
    ranks. While prompts are answered the model is in eval mode, also between two results.

    Args:
        vlm: the model.
        places: number of answers that each sampling group (tensor × pipeline ranks) works on at the same time.
        cache_gib: memory for keys and values on a rank.
        cache_setting: name of the setting that gives it, for messages.
        prompt_tokens: maximum number of tokens of new prompts that are computed together, unless one alone is longer.
        chunk_tokens: number of tokens whose logits exist at a time.
        batch_invariant: see ``megavlm.platform.batch_invariant``.
        decode: returns the text of tokens; only needed for stop strings.
        special: tokens that are not part of an answer's text.
        timer: makes a context manager around the part of the work that its argument names.
        records_routing: whether answers have their ``routing``; only for a mixture of experts.
        leaves: whether this rank wants to leave what ``generate`` is doing, which then raises StepLeft on all ranks;
            None: none ever does. It is asked every few tokens.
    """

    samples_apart = False

    def __init__(
        self,
        vlm: VLM,
        *,
        places: int,
        cache_gib: float,
        cache_setting: str,
        prompt_tokens: int,
        chunk_tokens: int,
        batch_invariant: bool = False,
        decode: Callable[[list[int]], str] | None = None,
        special: Sequence[int] = (),
        timer: Timer = untimed,
        records_routing: bool = False,
        leaves: Callable[[], bool] | None = None,
    ) -> None:
        self._vlm, self._view = vlm, sampling_view(vlm)
        self._memory = Memory.of(self._view, cache_gib, cache_setting)
        self._places, self._prompt_tokens, self._chunk_tokens = places, prompt_tokens, chunk_tokens
        self._batch_invariant, self._decode, self._special, self._timer = batch_invariant, decode, special, timer
        self._records_routing, self._leaves = records_routing, leaves

    def generate(self, prompts: Iterator[Prompt] | None, sampling: Sampling) -> Iterator[Answered]:
        """Answers prompts; see ``Engine.generate``."""
        source = self._source(prompts)
        stages = Stages(self._view, sampling, self._chunk_tokens, self._timer)
        rounds = Rounds(
            self._view, source, stages, Ending(sampling, self._decode, self._special), self._memory,
            places=self._places, longest=sampling.max_new_tokens, prompt_tokens=self._prompt_tokens, timer=self._timer,
            invariant=self._batch_invariant, records_routing=self._records_routing, leaves=self._leaves,
        )  # fmt: skip
        training = self._vlm.language[0].training
        self._vlm.train(False)
        try:
            yield from rounds
        finally:
            self._vlm.train(training)
        own = source.error if source is not None else None
        errors = [own, *all_gather_objects(own, self._vlm.groups.world_host)]
        # Each rank raises the same kind: of what went wrong, if anything did, and not that others have left.
        for error in sorted(filter(None, errors), key=lambda error: isinstance(error, StepLeft)):
            raise error

    def sync(self) -> None:
        """Does nothing: the weights are those of the model, and nothing is kept from one call to the next."""

    def close(self) -> None:
        """Does nothing: memory is freed at the end of each call."""

    def _source(self, prompts: Iterator[Prompt] | None) -> PromptSource | None:
        if not self._view.groups.is_leader:
            return None
        peers = self._view.groups.sampling.peers_host
        if peers is not None:
            return Dealt(prompts, peers)
        assert prompts is not None, "a leader has prompts"
        return PromptSource(prompts)
