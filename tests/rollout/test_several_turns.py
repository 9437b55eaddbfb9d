"""Answers in several turns, with an engine that says what it is told and environments that reply."""

import io
import re
import types
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from PIL import Image

from megavlm.base.errors import UserError
from megavlm.data.row import IGNORE, Annotations, Asked
from megavlm.environments.messages import Messages
from megavlm.environments.pool import Reply
from megavlm.environments.step import Observation
from megavlm.media.files import in_folder
from megavlm.reinforcement.answer_rows import AnswerGroup, answer_rows
from megavlm.rollout.conversations import Conversations
from megavlm.rollout.engine import Answer, Answered, Prompt, Sampling
from megavlm.rollout.sampling import mixed_seed


def png(level: int, size=(32, 32)) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((*size, 3), level, np.uint8)).save(file, "PNG")
    return file.getvalue()


class Group:
    """A group of one rank."""

    def size(self):
        return 1


@dataclass
class Script:
    """An engine that answers by a function of (prompt's text, seed), and remembers what it was asked."""

    tokenizer: object
    say: object
    asked: list = field(default_factory=list)
    samples_apart = True

    def generate(self, prompts, sampling):
        prompts = list(prompts)
        self.asked.append((prompts, sampling))
        for prompt in reversed(prompts):
            answers = []
            for seed in prompt.seeds:
                text = self.say(self.tokenizer.decode(prompt.sample.input_ids), seed)
                tokens = self.tokenizer(text)["input_ids"]
                finish = "stop"
                if len(tokens) > sampling.max_new_tokens:
                    tokens, finish = tokens[: sampling.max_new_tokens], "length"
                logs = [-float(n + 1) for n in range(len(tokens))]
                routing = torch.full((len(tokens), 2, 1), 9, dtype=torch.uint8)
                routing[-1] = 0
                answers.append(Answer(tokens, logs, [2 * x for x in logs], [3 * x for x in logs], finish, routing))
            count = len(prompt.sample.input_ids)
            yield Answered(prompt, answers, torch.full((count, 2, 1), len(self.asked), dtype=torch.uint8))

    def sync(self):
        pass

    def close(self):
        pass


class Scripted:
    """Environments in this process: a function of (columns, answers so far) gives a reply."""

    def __init__(self, reply):
        self._reply, self.pending, self.ended = reply, [], []

    def begin(self, columns, folder):
        one = types.SimpleNamespace(columns=columns, answers=[])
        self.pending.append(one)
        return Hashable(one)

    def step(self, episode, answer):
        episode.one.answers.append(answer)
        self.pending.append(episode.one)

    def end(self, episode):
        self.ended.append(episode)

    def wait(self, sign):
        found = {Hashable(one): self._made(self._reply(one.columns, one.answers)) for one in self.pending}
        self.pending = []
        return found

    @staticmethod
    def _made(said):
        return Reply(Observation(), said, 0.0) if isinstance(said, str) else Reply(said or Observation(), None, 0.0)

    def close(self):
        self.is_closed = True


class Hashable:
    def __init__(self, one):
        self.one = one

    def __hash__(self):
        return id(self.one)

    def __eq__(self, other):
        return self.one is other.one


END = "<|im_end|>"


@pytest.fixture(scope="module")
def prompts(renderer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    Image.fromarray(np.full((32, 64, 3), 100, np.uint8)).save(folder / "door.png")
    found = []
    for index, what in enumerate(("apple", "pear")):
        record = {
            "messages": [{"role": "user", "content": f"<image>Which {what}?"}], "images": ["door.png"], "answer": what,
        }  # fmt: skip
        sample = renderer.encode(record, in_folder(folder), f"{folder}/data.jsonl:{index + 1}", kind="prompt")
        asked = Asked(columns=record, question=f"Which {what}?", media=["door.png"], reference=what)
        sample.annotations = Annotations(asked=asked)
        found.append(Prompt(sample, (10 * index + 1, 10 * index + 2)))
    return found


def converse(
    renderer, prompts, say, reply, *, max_turns=3, max_tokens=200, max_new_tokens=20, role="user", max_patches=None
):
    engine, pool = Script(renderer.tokenizer, say), Scripted(reply)
    conversations = Conversations(
        engine,
        pool,
        Messages(renderer, role),
        max_turns=max_turns,
        max_tokens=max_tokens,
        max_patches=max_patches,
        group=Group(),
    )
    found = list(conversations.generate(iter(prompts), Sampling(max_new_tokens)))
    assert len(pool.ended) == sum(len(prompt.seeds) for prompt in prompts)
    by_prompt = {id(one.prompt): one.answers for one in found}
    return [by_prompt[id(prompt)] for prompt in prompts], engine, pool


def test_turns_follow_each_other(renderer, prompts):
    """Each conversation has tokens, masks, seeds, rewards and pictures of its own, and ends with its environment."""
    say = lambda text, seed: f"answer {text.count('assistant')} of {seed % 10}{END}"

    def reply(columns, answers):
        assert columns["answer"] in ("apple", "pear")
        assert columns["prompts"] == f"Which {columns['answer']}?"
        if not answers:
            return None
        turn = len(answers)
        assert answers[-1].startswith(f"answer {turn} of ")
        return Observation(f"reply {turn}", (png(turn),) if turn == 1 else (), 0.5 * turn, turn == 2)

    answers, engine, _ = converse(renderer, prompts, say, reply)
    assert [len(asked) for asked, _ in engine.asked] == [2, 4]  # prompts, then conversations
    assert engine.asked[0][0] == prompts
    assert sorted(p.seeds[0] for p in engine.asked[1][0]) == sorted(
        mixed_seed(seed, 2) for prompt in prompts for seed in prompt.seeds
    )
    for prompt, group in zip(prompts, answers, strict=True):
        for answer in group:
            assert (answer.reward, answer.failures, answer.finish, answer.num_turns) == (1.5, (), "stop", 2)
            text = renderer.tokenizer.decode(answer.tokens)
            pads = "<|image_pad|>"
            assert re.fullmatch(
                r"answer 1 of (\d+)<\|im_end\|>\n<\|im_start\|>user\n<\|vision_start\|>(<\|image_pad\|>)+"
                r"<\|vision_end\|>reply 1<\|im_end\|>\n<\|im_start\|>assistant\nanswer 2 of .*<\|im_end\|>",
                text,
            ), text
            whole = answer.continued
            assert whole.input_ids.tolist() == prompt.sample.input_ids.tolist() + answer.tokens
            assert whole.num_images == 2
            assert len(whole.pixels) == len(prompt.sample.pixels) + 4
            assert text.count(pads) == 1  # 32 x 32 pixels
            said = [token for token, is_said in zip(answer.tokens, answer.said, strict=True) if is_said]
            assert renderer.tokenizer.decode(said).count(END) == 2
            for name, factor in (("logprobs", 1), ("policy_logprobs", 2), ("sampled_logprobs", 3)):
                values = getattr(answer, name)
                assert len(values) == len(answer.tokens)
                assert all((value != 0) == is_said for value, is_said in zip(values, answer.said, strict=True))
                first = values[: len(values) - len(answer.last)]
                assert values[0] == -factor == values[len(first)]  # both turns begin anew
            assert renderer.tokenizer.decode(answer.last).startswith("answer 2 of ")
            told = [(turn.by, turn.text, len(turn.pictures)) for turn in answer.turns]
            assert [told[1], told[3]] == [("environment", "reply 1", 1), ("environment", "reply 2", 0)]
            assert [by for by, _, _ in told] == ["model", "environment"] * 2


def test_experts_are_those_of_the_passes_that_sampled(renderer, prompts):
    """A token's experts are of the pass that has read it: the last of a turn is read with the next turn's prompt."""
    reply = lambda columns, answers: Observation("more", (), None, len(answers) == 2) if answers else None
    [(answer, *_), _], _, _ = converse(renderer, prompts, lambda text, seed: f"a b c{END}", reply)
    routing, length = answer.routing[:, 0, 0].tolist(), len(prompts[0].sample.input_ids)
    turn = len(answer.last)
    between = len(answer.tokens) - 2 * turn
    expected = [1] * length + [9] * (turn - 1) + [2] + [2] * between + [9] * (turn - 1) + [0]
    assert routing == expected
    assert len(routing) == len(answer.continued.input_ids)


@pytest.mark.parametrize(
    ("settings", "reply", "say", "expected"),
    [
        ({"max_turns": 2}, Observation("go on"), "a", {"num_turns": 2, "is_out_of_turns": True, "finish": "stop"}),
        ({"max_tokens": 12}, Observation("go on"), "a", {"num_turns": 1, "is_out_of_turns": False, "finish": "length"}),
        ({"max_new_tokens": 2}, Observation("go on"), "a b c d e f", {"num_turns": 1, "finish": "length"}),
        ({"max_tokens": 60}, Observation("x " * 30), "a", {"num_turns": 1, "finish": "length"}),
        ({}, Observation("", (), 2.0, True), "a", {"num_turns": 1, "finish": "stop", "reward": 2.0}),
        ({}, Observation(), "a", {"num_turns": 3, "is_out_of_turns": True, "reward": 0.0}),
    ],
)
def test_where_a_conversation_ends(renderer, prompts, settings, reply, say, expected):
    say, given = say + END, reply
    reply = lambda columns, answers: given if answers else None
    answers, _, _ = converse(renderer, prompts, lambda text, seed: say, reply, **settings)
    for answer in (answer for group in answers for answer in group):
        assert {name: getattr(answer, name) for name in expected} == expected
        assert len(answer.tokens) <= settings.get("max_tokens", 200)
        assert answer.said[-1], "what follows the last turn is not learned, so it is not there"
        assert answer.failures == ()


def test_a_turn_is_cut_off_at_the_budget(renderer, prompts):
    say = lambda text, seed: f"{'a b c d e f g h' if 'more' in text else 'a'}{END}"
    reply = lambda columns, answers: Observation("more") if answers else None
    whole, _, _ = converse(renderer, prompts, say, reply, max_turns=2)
    most = len(whole[0][0].tokens) - 3
    answers, engine, _ = converse(renderer, prompts, say, reply, max_turns=2, max_tokens=most)
    assert [sampling.max_new_tokens for _, sampling in engine.asked][1] < 20  # what is left of the budget
    for cut, full in zip(answers[0], whole[0], strict=True):
        assert (cut.tokens, cut.finish) == (full.tokens[:most], "length")


def test_a_failure_costs_only_its_conversation(renderer, prompts):
    def reply(columns, answers):
        if columns["answer"] == "pear" and not answers:
            return "reset: no"
        if answers and answers[-1] == "seed 1":
            return "step: no"
        if answers and answers[-1] == "seed 2":
            return Observation("see", (b"broken",))
        return None

    say = lambda text, seed: f"seed {seed}{END}"
    (apple, pear), _, _ = converse(renderer, prompts, say, reply)
    assert [answer.failures for answer in pear] == [("reset: no",)] * 2
    assert all(answer.tokens == [] and answer.reward is None and answer.num_turns == 0 for answer in pear)
    assert apple[0].failures == ("step: no",)
    assert "picture 1 of its environment cannot be read" in apple[1].failures[0]
    assert [answer.reward for answer in apple] == [None, None]
    assert len(answer_rows([AnswerGroup(prompts[1].sample, pear, [0.0, 0.0])], renderer, None)) == 1


def test_an_environment_may_speak_first(renderer, prompts):
    def reply(columns, answers):
        if not answers:
            return Observation(f"Hint {columns['answer']}", (png(3),)) if columns["answer"] == "pear" else None
        return Observation("", (), 1.0, True)

    (apple, pear), engine, _ = converse(renderer, prompts, lambda text, seed: f"ok{END}", reply)
    first = {prompt.sample.source: prompt for prompt in engine.asked[0][0]}
    assert [len(prompt.seeds) for prompt in first.values()] == [2, 2]  # both are told the same, so they share it
    assert first[prompts[0].sample.source] == prompts[0]
    text = renderer.tokenizer.decode(pear[0].continued.input_ids)
    assert text.count("<|im_start|>assistant") == 1
    assert "Which pear?<|im_end|>\n<|im_start|>user\n<|vision_start|>" in text
    assert pear[0].continued.input_ids[-len(pear[0].tokens) :].tolist() == pear[0].tokens
    assert renderer.tokenizer.decode(pear[0].last) == f"ok{END}"
    assert not pear[0].said[0]
    assert renderer.tokenizer.decode(apple[0].tokens) == f"ok{END}"


def test_rows_have_targets_where_the_model_has_spoken(renderer, prompts):
    """Conversations without pictures of their own share those of the prompt; the others stand by themselves."""

    def reply(columns, answers):
        pictures = (png(1),) if answers and answers[-1] == "seed 2" else ()
        return Observation("more", pictures, 0.5, len(answers) == 2) if answers else None

    say = lambda text, seed: f"{'more' if 'more' in text else f'seed {seed}'}{END}"
    (answers, _), _, _ = converse(renderer, prompts, say, reply)
    group = AnswerGroup(prompts[0].sample, [answers[0], answers[1], answers[0]], [1.0, 2.0, 3.0])
    [row] = answer_rows([group], renderer, None)
    by_number = {note.sampled.number: place for place, note in enumerate(row.annotations)}
    assert sorted(by_number) == [0, 1, 2]
    assert row.num_images == 1 + 2  # one for two answers, and both of the other
    for number, answer in ((0, answers[0]), (1, answers[1]), (2, answers[0])):
        place = by_number[number]
        start, length = int(row.cu_seqlens[place]), row.sample_lengths[place]
        labels = row.labels[start : start + length].tolist()
        first = length - len(answer.tokens)
        expected = [IGNORE] * length
        for n, (token, is_said) in enumerate(zip(answer.tokens, answer.said, strict=True)):
            if is_said:
                expected[first + n - 1] = token
        assert labels == expected
        said = [value for value, is_said in zip(answer.policy_logprobs, answer.said, strict=True) if is_said]
        assert row.annotations[place].sampled.logprobs.tolist() == said
        assert row.annotations[place].sampled.advantage == [1.0, 2.0, 3.0][number]
    cut = [types.SimpleNamespace(**{**vars(answers[1]), "finish": "length"})]
    [row] = answer_rows([AnswerGroup(prompts[0].sample, cut, [1.0])], renderer, None, mask_truncated=True)
    assert row.num_targets == 0


def test_an_error_of_reading_or_loading_is_raised(renderer, prompts):
    def reading():
        yield prompts[0]
        raise UserError("too many bad prompts")

    with pytest.raises(UserError, match="too many bad prompts"):
        converse(renderer, reading(), lambda text, seed: END, lambda columns, answers: None)

    def fails(columns, answers):
        raise UserError("cannot be loaded")

    with pytest.raises(UserError, match="cannot be loaded"):
        converse(renderer, prompts, lambda text, seed: END, fails)


@pytest.mark.parametrize(("patches", "turns"), [(None, 3), (16, 3), (15, 2)])
def test_a_conversation_takes_no_more_pictures_than_a_row_may_have(renderer, prompts, patches, turns):
    """Its prompt has 8 patches, and the picture of each reply 4."""
    say = lambda text, seed: f"more{END}"
    reply = lambda columns, answers: Observation("look", (png(1),), 0.0, len(answers) == 3) if answers else None
    answers, *_ = converse(renderer, prompts, say, reply, max_patches=patches, max_tokens=400)
    for answer in answers[0]:
        total = int(answer.continued.frame_grids.prod(dim=1).sum())
        assert answer.num_turns == turns
        assert answer.finish == ("stop" if turns == 3 else "length")
        assert not patches or total <= patches


def test_replies_of_text_alone_copy_no_pictures(renderer, prompts):
    reply = lambda columns, answers: Observation("go on", (), 0.0, len(answers) == 2) if answers else None
    answers, *_ = converse(renderer, prompts, lambda text, seed: f"yes{END}", reply)
    for prompt, group in zip(prompts, answers, strict=True):
        for answer in group:
            assert answer.num_turns == 2
            assert answer.continued.pixels.data_ptr() == prompt.sample.pixels.data_ptr()
