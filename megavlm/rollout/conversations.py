"""Answers in several turns: an engine over another engine, with an environment that replies between the turns.

In each round the other engine answers all conversations that go on. Each answer is given to its environment as soon as
it arrives, so that environments work while others are still sampled. What the model has said stays the tokens that
were sampled, and what the environment says is tokenised alone (``megavlm.environments.messages``).
"""

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megavlm.base.errors import UserError
from megavlm.base.heartbeat import beat
from megavlm.data.row import Sample
from megavlm.environments.messages import Messages
from megavlm.environments.pool import EnvironmentPool, Reply
from megavlm.environments.worker_process import Episode
from megavlm.platform.collectives import all_gather_objects, picklable
from megavlm.rollout.conversation import Conversation
from megavlm.rollout.engine import Answer, Answered, Engine, Prompt, Sampling, Turn
from megavlm.rollout.sampling import mixed_seed

_PATIENCE = 10.0  # seconds in which a thread that is being answered must notice that the engine has ended


@dataclass(eq=False)
class _Asked:
    """A prompt and its conversations, in the order of the seeds."""

    prompt: Prompt
    conversations: list[Conversation] = field(default_factory=list)


class Conversations:
    """Answers prompts in several turns; see ``Engine``. Create it on all ranks.

    Args:
        engine: samples each turn.
        pool: the environments, on leaders; None elsewhere.
        messages: renders what they say, on leaders; None elsewhere.
        max_turns: maximum number of turns of the model.
        max_tokens: maximum number of tokens after a prompt; a turn is cut off there.
        max_patches: maximum number of patches in a conversation, which it may not grow beyond; None: no limit.
        group: all ranks, on the host network.

    Attributes:
        seconds: how long this rank has waited for environments.
    """

    def __init__(
        self,
        engine: Engine,
        pool: EnvironmentPool | None,
        messages: Messages | None,
        *,
        max_turns: int,
        max_tokens: int,
        max_patches: int | None = None,
        group: dist.ProcessGroup,
    ):
        self._engine, self._pool, self._messages = engine, pool, messages
        self._max_turns, self._max_tokens, self._max_patches, self._group = max_turns, max_tokens, max_patches, group
        self._alone = threading.Lock()
        self.seconds = 0.0

    @property
    def samples_apart(self) -> bool:
        """As the engine's."""
        return self._engine.samples_apart

    def generate(self, prompts: Iterator[Prompt] | None, sampling: Sampling) -> Iterator[Answered]:
        """Answers prompts; see ``Engine.generate``. All prompts are read before the first is answered.

        The first turn of an answer has its seed, so an environment that ends every conversation after one turn changes
        nothing. A failure of an environment costs only its answer, which has ``failures`` and no reward. Of several
        threads, one at a time is answered.

        Raises:
            UserError: on all ranks, also if the environments cannot be loaded.
            Exception: on all ranks, what reading a prompt raises, at once.
        """
        with self._alone:
            yield from self._generate(prompts, sampling)

    def _generate(self, prompts: Iterator[Prompt] | None, sampling: Sampling) -> Iterator[Answered]:
        everything: list[_Asked] = []
        error: Exception | None = None
        try:
            everything = self._begun(prompts) if prompts is not None else []
        except Exception as raised:
            error = raised
        going = [one for asked in everything for one in asked.conversations if not one.is_over]
        unanswered = list(everything)
        turn = 1
        while (room := self._agreed(max((one.room for one in going), default=0), error)) > 0:
            limited = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))
            by_prompt = self._prompts_of(everything if turn == 1 else [], going, turn)
            asking = iter([prompt for prompt, _ in by_prompt.values()]) if prompts is not None else None
            for answered in self._engine.generate(asking, limited):
                for one, answer in zip(by_prompt[id(answered.prompt)][1], answered.answers, strict=True):
                    self._give(one, answer, answered.routing)
            try:
                self._take(going)
            except Exception as raised:
                error = raised
            going = [one for one in going if not one.is_over]
            done = [asked for asked in unanswered if all(one.is_over for one in asked.conversations)]
            unanswered = [asked for asked in unanswered if asked not in done]
            yield from map(_answered, done)
            turn += 1
        yield from map(_answered, unanswered)  # those of which every conversation failed before its first turn

    def sync(self) -> None:
        """As the engine's."""
        self._engine.sync()

    def close(self) -> None:
        """Ends the engine, and all environments."""
        self._engine.close()
        is_alone = self._alone.acquire(timeout=_PATIENCE)  # a thread may still be told that the engine has ended
        if self._pool is not None:
            self._pool.close()
        if is_alone:
            self._alone.release()

    def take_seconds(self) -> float:
        """The seconds that this rank has waited for environments since the last call."""
        taken, self.seconds = self.seconds, 0.0
        return taken

    def _agreed(self, room: int, error: Exception | None) -> int:
        """The largest room of all ranks, which must all go on if one does; a rank's error is raised on all."""
        if self.samples_apart:
            if error is not None:
                raise error
            return room
        everyone = all_gather_objects((room, None if error is None else picklable(error)), self._group)
        for problem in (error, *(problem for _, problem in everyone)):
            if problem is not None:
                raise problem
        return max(rooms for rooms, _ in everyone)

    def _begun(self, prompts: Iterator[Prompt]) -> list[_Asked]:
        """Reads all prompts, and begins their conversations."""
        assert self._pool is not None, "leaders have environments"
        everything, conversations = list[_Asked](), dict[Episode, Conversation]()
        for prompt in prompts:
            asked, columns = _Asked(prompt), _columns(prompt)
            for seed in prompt.seeds:
                episode = self._pool.begin(columns, _folder(prompt.sample.source))
                one = Conversation(seed, episode, prompt.sample, self._max_tokens)
                conversations[episode] = one
                asked.conversations.append(one)
            everything.append(asked)
        for episode, reply in self._replies().items():
            self._open(conversations[episode], reply)
        return everything

    def _open(self, one: Conversation, reply: Reply) -> None:
        """The environment has replied to reset; most often it says nothing."""
        assert self._messages is not None, "leaders render messages"
        if reply.cause is not None:
            self._end(one, reply.cause)
            return
        said = reply.observation
        if not said.text and not said.pictures:
            return
        one.turns.append(Turn("environment", said.text, said.pictures))
        try:
            sample = self._messages.after_prompt(one.sample, said.text, said.pictures, one.sample.source)
        except UserError as error:
            self._end(one, error.message)
            return
        new = sample.input_ids[len(one.sample.input_ids) - self._messages.opening_tokens :].tolist()
        if len(new) >= one.room:
            self._end(one, f"reset: its message has {len(new)} tokens, but environment.max_tokens is {one.room}")
            return
        one.sample, one.room = sample, one.room - len(new)
        one.values = [(token, 0.0, 0.0, 0.0, False) for token in new]

    def _prompts_of(
        self, everything: Sequence[_Asked], going: Sequence[Conversation], turn: int
    ) -> dict[int, tuple[Prompt, list[Conversation]]]:
        """The prompts of a round, with the conversations that their answers are for, by id.

        In the first turn, the conversations of a prompt share it, unless its environments have said different things.
        """
        found = []
        if turn > 1:
            found = [(Prompt(one.sample, (mixed_seed(one.seed, turn),)), [one]) for one in going]
        for asked in everything:
            groups: list[list[Conversation]] = []
            for one in asked.conversations:
                if not one.is_over:
                    same = next((group for group in groups if group[0].turns == one.turns), None)
                    groups.append([one]) if same is None else same.append(one)
            found += [(Prompt(group[0].sample, tuple(one.seed for one in group)), group) for group in groups]
        return {id(prompt): (prompt, group) for prompt, group in found}

    def _give(self, one: Conversation, answer: Answer, routing: Tensor | None) -> None:
        """A turn of the model, which the environment gets at once."""
        assert self._pool is not None, "answers arrive on leaders"
        assert self._messages is not None, "answers arrive on leaders"
        before = len(one.values)
        one.hear(answer, routing)
        tokens, tokenizer = [value[0] for value in one.values[before:]], self._messages.tokenizer
        one.turns.append(Turn("model", tokenizer.decode(tokens)))
        self._pool.step(one.episode, tokenizer.decode(tokens, skip_special_tokens=True))

    def _take(self, going: Sequence[Conversation]) -> None:
        """What the environments have said to the last turns."""
        by_episode = {one.episode: one for one in going}
        for episode, reply in self._replies().items():
            self._reply(by_episode[episode], reply)

    def _reply(self, one: Conversation, reply: Reply) -> None:
        assert self._messages is not None, "leaders render messages"
        said = reply.observation
        if reply.cause is not None:
            self._end(one, reply.cause)
            return
        one.reward += said.reward or 0.0
        if said.text or said.pictures:
            one.turns.append(Turn("environment", said.text, said.pictures))
        if said.done or one.finish == "length":
            self._end(one)
            return
        if one.num_turns == self._max_turns:
            one.is_out_of_turns = True
            self._end(one)
            return
        try:
            last = one.values[-1][0]
            message = self._messages.after_answer(last, said.text, said.pictures, one.sample.source)
        except UserError as error:
            self._end(one, error.message)
            return
        if len(message.input_ids) >= one.room or not self._has_patches_for(one, message):
            one.finish = "length"
            self._end(one)
            return
        one.read(message)

    def _has_patches_for(self, one: Conversation, message: Sample) -> bool:
        """Whether the pictures of a message still fit in a row beside those of the conversation."""
        patches = sum(int(sample.frame_grids.prod(dim=1).sum()) for sample in (one.sample, message))
        return not self._max_patches or patches <= self._max_patches

    def _end(self, one: Conversation, cause: str | None = None) -> None:
        assert self._pool is not None, "leaders have environments"
        one.is_over = True
        if cause is not None:
            one.fail(cause)
        self._pool.end(one.episode)

    def _replies(self) -> dict[Episode, Reply]:
        if self._pool is None:
            return {}
        began = time.perf_counter()
        try:
            return self._pool.wait(lambda: beat("the environments"))
        finally:
            self.seconds += time.perf_counter() - began


def _answered(asked: _Asked) -> Answered:
    return Answered(asked.prompt, [one.result() for one in asked.conversations])


def _columns(prompt: Prompt) -> dict[str, Any]:
    """What reset gets: the fields of the record, and what rewards get beside them."""
    asked = prompt.sample.annotations.asked
    columns: dict[str, Any] = {"seed": mixed_seed(*prompt.seeds[:1]), "folder": _folder(prompt.sample.source)}
    if asked is None:
        return columns
    if asked.reference is not None:
        columns["answer"] = asked.reference
    return {**columns, **asked.columns, "prompts": asked.question}


def _folder(source: str) -> str:
    """The folder of the data from "file:line"."""
    file = source.rpartition(":")[0]
    return file.rpartition("/")[0] or "."
