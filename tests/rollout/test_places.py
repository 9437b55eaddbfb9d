"""Memory and places: nothing is shared by mistake, nothing waits forever, and answers end where they should."""

import numpy as np
import pytest

from megavlm.rollout.answers import Ending, Growing, OpenPrompt
from megavlm.rollout.blocks import BLOCK_TOKENS, Blocks
from megavlm.rollout.engine import Sampling
from megavlm.rollout.places import Places

VALUES = (0.0, 0.0, 0.0)


def asked(length: int, answers: int) -> OpenPrompt:
    return OpenPrompt(length, 0, [Growing(seed) for seed in range(answers)])


def places_of(count: int, blocks: Blocks, longest: int) -> Places:
    return Places(count, blocks, Ending(Sampling(longest, stop=(0,)), None), longest)


def test_blocks_are_used_once_and_again():
    blocks = Blocks(6)
    first, second = blocks.take(BLOCK_TOKENS + 1), blocks.take(3 * BLOCK_TOKENS)
    assert len(first) == BLOCK_TOKENS + 1
    assert not set(first) & set(second)
    assert blocks.free == 1
    blocks.give_back(first)
    assert blocks.free == 3
    touched = blocks.touched
    third = blocks.take(2 * BLOCK_TOKENS)
    assert set(first) < set(third)  # memory that was in use is used again before more of it is touched
    assert blocks.touched == touched
    assert len(blocks.take(0)) == 0
    blocks.take(BLOCK_TOKENS)
    with pytest.raises(AssertionError, match="1 blocks wanted, 0 free"):
        blocks.take(1)


def test_answers_get_places_and_memory_as_others_end():
    """Memory for a prompt and two answers, four answers, three places; an answer needs two blocks."""
    blocks = Blocks(1 + 2 * 2)
    places = places_of(3, blocks, BLOCK_TOKENS + 2)
    prompt = asked(5, 4)
    assert places.fits(5)
    places.start(prompt)
    assert [answer.slots is not None for answer in prompt.answers] == [True, True, False, False]
    assert places.free == 0  # an answer that waits comes before another prompt
    places.add([(prompt, answer, 1, VALUES) for answer in prompt.answers])  # all get their first token
    assert len(places.growing) == 2
    assert places.add([(prompt, prompt.answers[0], 0, VALUES), (prompt, prompt.answers[1], 1, VALUES)]) == []
    assert prompt.answers[0].finish == "stop"
    places.let_in()
    assert [answer for _, answer in places.growing] == [prompt.answers[1], prompt.answers[2]]
    assert not places.fits(1)
    for answer in prompt.answers[1:3]:
        places.add([(prompt, answer, 0, VALUES)])
    places.let_in()
    assert places.add([(prompt, prompt.answers[3], 0, VALUES)]) == [prompt]
    assert places.is_empty
    assert blocks.free == blocks.count


def test_an_answer_may_end_before_it_has_a_place():
    blocks = Blocks(4)
    places = places_of(1, blocks, 4)
    prompt = asked(3, 2)
    places.start(prompt)
    assert places.add([(prompt, answer, 0, VALUES) for answer in prompt.answers]) == [prompt]
    assert blocks.free == 4
    single = places_of(2, blocks, 1)  # answers of one token need no memory of their own
    prompt = asked(4 * BLOCK_TOKENS, 2)
    single.start(prompt)
    assert single.add([(prompt, answer, 7, VALUES) for answer in prompt.answers]) == [prompt]
    assert [answer.finish for answer in prompt.answers] == ["length", "length"]
    assert blocks.free == 4


def ended(text: str, stops: tuple[str, ...], special: tuple[int, ...] = ()) -> str:
    """The part of a text, given byte by byte, after which an answer ends."""
    decode = lambda tokens: bytes(tokens).decode(errors="replace")
    ending = Ending(Sampling(1000, stop_strings=stops), decode, special)
    answer = Growing(0)
    for token in text.encode():
        ending.add(answer, token, VALUES)
        if answer.finish is not None:
            break
    return bytes(answer.tokens).decode()


def test_stop_strings_end_an_answer_wherever_they_begin():
    assert ended("one\ntwo", ("\n",)) == "one\n"
    assert ended("a, b and c", ("c", " and")) == "a, b and"
    assert ended("ça va — bien", ("— b",)) == "ça va — b"
    assert ended("never", ("x", "nevers")) == "never"
    assert ended("</an~sw~er> more", ("</answer>",), special=(ord("~"),)) == "</an~sw~er>"


def test_slots_are_those_of_whole_blocks():
    blocks = Blocks(3)
    blocks.take(1)
    assert np.array_equal(blocks.take(2), [BLOCK_TOKENS, BLOCK_TOKENS + 1])
