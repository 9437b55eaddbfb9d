"""The answers of a run in the order of its prompts: sampled when a step asks for them, or ahead of it in threads."""

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megavlm.base.errors import UserError
from megavlm.base.heartbeat import beat
from megavlm.base.stop_signals import StepLeft, is_leaving, leavable
from megavlm.config.requirements import required
from megavlm.data.answers import first_sample
from megavlm.data.loader import Place, RowLoader
from megavlm.data.renderer import Renderer
from megavlm.data.row import Row
from megavlm.records.skipped_samples import SkippedSample
from megavlm.rewards.pool import RewardPool
from megavlm.rewards.score import columns_of
from megavlm.rollout.engine import Answered, Engine, Prompt, Sampling
from megavlm.rollout.sampling import mixed_seed
from megavlm.runtime.session import Session
from megavlm.training.step import raise_everywhere

_SECONDS_BETWEEN_SIGNS = 1.0  # of life, while answers are awaited


@dataclass(eq=False)
class Asked:
    """A prompt that an engine answers, and what was read with it.

    Attributes:
        number: its number on this rank in this start of the run; the rewards know it by this number.
        prompt: the prompt.
        version: number of steps of this start before its answers were begun.
        skipped_samples, newly_read, source_id: of the row in which it was read.
        place: where the rows end that were read so far.
        answered: its answers, as soon as they are there.
    """

    number: int
    prompt: Prompt
    version: int
    skipped_samples: list[SkippedSample]
    newly_read: list[int]
    source_id: int
    place: Place
    answered: Answered | None = None


@dataclass(eq=False)
class _Flight:
    """Prompts that a thread has answered, and the error that has ended it."""

    asked: list[Asked]
    error: BaseException | None = None


class AnswerQueue:
    """Has prompts answered, and gives each group to the rewards as soon as it is complete. Create it on all ranks.

    An engine that works apart is asked in threads. With ``rollout.ahead`` n, it answers the prompts of the next n steps
    while a step learns. They are taken in the order in which they were read, so no answer waits for its length, and
    what a checkpoint says of the data ends with the last prompt that was taken.

    Args:
        session: the session of the run.
        engine: samples the answers.
        sampling: how it samples.
        renderer: decodes the answers on the leader of each model-parallel group; None elsewhere.
        loader: the loader of the prompts, on the same ranks.
        rows: the rows of that loader, one prompt each.
        rewards: judges the answers, on the same ranks.

    Attributes:
        engine, sampling, loader, rewards: see above.
        version: number of steps that have begun, less 1.
    """

    def __init__(
        self,
        session: Session,
        engine: Engine,
        sampling: Sampling,
        renderer: Renderer | None,
        loader: RowLoader | None,
        rows: Iterator[Row] | None,
        rewards: RewardPool | None,
    ):
        self._session, self.engine, self.sampling, self._renderer = session, engine, sampling, renderer
        self.loader, self._rows, self.rewards = loader, rows, rewards
        rollout = session.settings.rollout
        self._ahead = rollout.ahead * required(rollout.prompts, "rollout.prompts") // session.groups.dp_size
        self._open: deque[Asked] = deque()
        self._flights: list[tuple[threading.Thread, _Flight]] = []
        self._changed = threading.Condition()
        self._number = 0
        self.version = -1

    def begin_step(self) -> float:
        """Hands the present weights to the engine. Call it on all ranks. Returns the seconds that this took."""
        began = time.perf_counter()
        self.version += 1
        self.engine.sync()
        if self.loader is not None:
            self.loader.begin_step()
        return time.perf_counter() - began

    def take(self, count: int) -> list[Asked]:
        """The next ``count`` prompts of each data-parallel rank with their answers, on leaders; [] elsewhere.

        Call it on all ranks.

        Raises:
            NoRows: on all ranks, if a rank has no prompts, or its answers cannot be sampled.
            StepLeft: on all ranks, if a run is asked to stop on one of them while it samples.
        """
        with leavable():
            return self._take_from_threads(count) if self.engine.samples_apart else self._take_in_turn(count)

    def _take_in_turn(self, count: int) -> list[Asked]:
        """See ``take``, of an engine whose ``generate`` all ranks call."""
        taken: list[Asked] = []
        problem: UserError | None = None
        try:
            taken = self._answer(count)
        except UserError as error:  # the engine raises it on all ranks
            problem = error
        raise_everywhere(problem, problem is not None, self._session.groups)
        return taken

    def close(self) -> None:
        """Ends the engine and the processes of the rewards; answers that nobody has taken are dropped."""
        self.engine.close()
        for thread, _ in self._flights:
            thread.join(timeout=10.0)
        if self.rewards is not None:
            self.rewards.close()

    def texts(self, answered: Answered, *, special: bool = False) -> list[str]:
        """The texts of the answers, of several turns that of the last one."""
        tokens = [answer.last for answer in answered.answers]
        assert self._renderer is not None, "answers arrive on leaders"
        return self._renderer.tokenizer.batch_decode(tokens, skip_special_tokens=not special)

    def _answer(self, count: int) -> list[Asked]:
        """Reads prompts while others are answered, and waits for all answers."""
        asked: list[Asked] = []

        def read() -> Iterator[Prompt]:
            for one in self._read(count):
                asked.append(one)
                yield one.prompt

        self._generate(asked, read() if self.loader is not None else None)
        assert all(one.answered is not None for one in asked), "the engine answers every prompt"
        return asked

    def _take_from_threads(self, count: int) -> list[Asked]:
        """Asks the next prompts, and waits for the answers to the first; all ranks meet each second meanwhile.

        Without that, ranks that have no prompts would wait in one collective as long as sampling takes.
        """
        taken: list[Asked] = []
        problem: UserError | None = None
        if self.loader is not None:
            try:
                self._ask(count + self._ahead - len(self._open))
                taken = [self._open.popleft() for _ in range(count)]
            except UserError as error:
                problem = error
        is_waiting = True
        while is_waiting:
            with self._changed:
                if problem is None and not _are_answered(taken):
                    self._changed.wait(_SECONDS_BETWEEN_SIGNS)
                problem = problem or self._failure()
                here = problem is None and not _are_answered(taken)
            told = torch.tensor([int(here), int(problem is not None), int(is_leaving())])
            dist.all_reduce(told, group=self._session.groups.world_host)
            is_waiting = bool(told[0]) and not told[1]
            if is_waiting and told[2]:
                raise StepLeft
            beat("the answers")  # engines have time-outs of their own
        raise_everywhere(problem, problem is not None, self._session.groups)
        # One that has failed since stays, so that the next step hears of it.
        self._flights = [(thread, flight) for thread, flight in self._flights if thread.is_alive() or flight.error]
        if self.loader is not None and self._ahead and taken:
            self.loader.hold(taken[-1].place)
        return taken

    def _ask(self, count: int) -> None:
        """Reads prompts and has a thread answer them. Raises UserError if there are none."""
        new = list(self._read(count))
        self._open.extend(new)
        if new:
            flight = _Flight(new)
            thread = threading.Thread(target=self._fly, args=(flight,), name="answers", daemon=True)
            self._flights.append((thread, flight))
            thread.start()

    def _failure(self) -> UserError | None:
        """The error of a thread, if it is for the user; any other one is raised."""
        error = next((flight.error for _, flight in self._flights if flight.error is not None), None)
        if error is not None and not isinstance(error, UserError):
            raise error
        return error

    def _fly(self, flight: _Flight) -> None:
        """A thread: answers prompts that were read."""
        try:
            self._generate(flight.asked, iter([one.prompt for one in flight.asked]))
            assert all(one.answered is not None for one in flight.asked), "the engine answers every prompt"
        except BaseException as error:
            flight.error = error
        with self._changed:
            self._changed.notify_all()

    def _generate(self, asked: Sequence[Asked], prompts: Iterator[Prompt] | None) -> None:
        """``asked`` may grow while the engine reads ``prompts``."""
        for answered in self.engine.generate(prompts, self.sampling):
            one = next(one for one in asked if one.prompt is answered.prompt)
            record, texts = answered.asked, self.texts(answered)
            assert self.rewards is not None, "answers arrive on leaders, which have rewards"
            self.rewards.submit(one.number, texts, columns_of(record.fields, record.question, len(texts)))
            with self._changed:
                one.answered = answered
                self._changed.notify_all()

    def _read(self, count: int) -> Iterator[Asked]:
        """The next prompts of this data-parallel rank. Raises UserError if there are none."""
        assert self.loader is not None, "leaders have prompts"
        assert self._rows is not None, "leaders have prompts"
        groups, settings = self._session.groups, self._session.settings
        size = required(settings.rollout.group_size, "rollout.group_size")
        for _ in range(count):
            number = self.loader.next_number(groups.dp_rank)
            row = next(self._rows)
            seeds = tuple(mixed_seed(settings.train.seed, number, n) for n in range(size))
            prompt = Prompt(first_sample(row), seeds)
            yield Asked(
                self._number, prompt, self.version, row.skipped_samples, row.newly_read, row.source_ids[0],
                self.loader.place,
            )  # fmt: skip
            self._number += 1


def _are_answered(asked: Sequence[Asked]) -> bool:
    return all(one.answered is not None for one in asked)
