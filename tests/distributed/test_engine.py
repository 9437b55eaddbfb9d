"""The built-in engine: its log-probabilities are the model's, and an answer depends on nothing but its own seed."""

import re
from dataclasses import replace

import pytest
import torch
from test_generate import questions_of
from toy import write_records

PROMPTS = 8


def engine_of(session, renderer, **options):
    from megavlm.rollout.builtin import BuiltinEngine

    tokenizer = renderer.processor.tokenizer
    return BuiltinEngine(
        session.vlm,
        **{
            "places": 5, "cache_gib": 0.1, "cache_setting": "generate.cache_gib", "prompt_tokens": 256,
            "chunk_tokens": 7, "decode": tokenizer.decode, "special": tokenizer.all_special_ids, **options,
        },
    )  # fmt: skip


def start(settings: dict):
    """A session, its renderer, and the rendered questions."""
    from toy import read_samples

    from megavlm.config.settings import Settings
    from megavlm.data.renderer import Renderer
    from megavlm.runtime import session

    settings = Settings(**settings)
    renderer = Renderer(settings.model.hf, settings.data)
    return (
        session.start(settings, training=False),
        renderer,
        read_samples(settings.data.eval[0].path, renderer, "prompt"),
    )


def seeds_of(index: int, count: int) -> tuple[int, ...]:
    return tuple(1000 * index + n for n in range(count))


def sample(settings: dict, sampling: dict, *, order=range(PROMPTS), count=3, **options) -> dict[int, list]:
    """Runs on every rank: on leaders, the answers to the prompts that this data rank has read, by index."""
    from megavlm.rollout.engine import Prompt, Sampling

    session, renderer, samples = start(settings)
    groups = session.groups
    mine = list(order)[groups.dp_rank :: groups.dp_size]
    prompts = iter([Prompt(samples[i], seeds_of(i, count)) for i in mine]) if groups.is_leader else None
    engine = engine_of(session, renderer, **options)
    answered = list(engine.generate(prompts, Sampling(**sampling)))
    assert groups.is_leader or not answered
    return {one.prompt.sample.index: one.answers for one in answered}


def together(ranks: list[dict]) -> dict[int, list]:
    return {index: answers for rank in ranks for index, answers in sorted(rank.items())}


def tokens_of(answers: dict[int, list]) -> dict[int, list]:
    return {index: [answer.tokens for answer in of_prompt] for index, of_prompt in answers.items()}


def with_answer(prompt, tokens: list[int]):
    """A sample of training: the prompt, and the answer as targets."""
    new, old = torch.tensor(tokens), len(prompt.input_ids)
    labels = torch.full((old + len(tokens),), -100)
    labels[old - 1 : -1] = new
    positions = prompt.position_ids.max() + 1 + torch.arange(len(tokens))
    return replace(
        prompt,
        input_ids=torch.cat([prompt.input_ids, new]),
        labels=labels,
        loss_weights=(labels >= 0).float(),
        position_ids=torch.cat([prompt.position_ids, positions.expand(3, -1)], dim=1),
    )


def forward(settings: dict, answers: dict[int, list], temperature: float) -> dict[int, list]:
    """On one process: logprobs and policy_logprobs of answers by an ordinary forward pass, in float64 from logits."""
    from megavlm.runtime.feed import Feed
    from megavlm.runtime.forward import encode_window, forward_chunk

    session, renderer, samples = start(settings)
    found: dict[int, list] = {}
    with torch.no_grad():
        for index, of_prompt in sorted(answers.items()):
            row = renderer.pack([with_answer(samples[index], answer.tokens) for answer in of_prompt], 1024)
            feed = Feed(session.vlm, iter([row]))
            window = next(feed.windows(feed.rows(1), 1))
            encode_window(session.vlm, window)
            hidden = forward_chunk(session.vlm, session.vlm.language[0], window.micro_batches[0])
            at = (row.labels >= 0).nonzero().flatten()
            logits = session.vlm.language[0].logits(hidden, at).double()
            take = lambda logs, at=at, row=row: logs.gather(1, row.labels[at][:, None])[:, 0]
            lengths = [len(answer.tokens) for answer in of_prompt]
            both = [take(logits.log_softmax(-1)), take((logits / temperature).log_softmax(-1))]
            found[index] = list(zip(*(values.split(lengths) for values in both), strict=True))
    return found


@pytest.fixture(scope="session")
def asked(toys):
    data = write_records(toys.root / "asked.jsonl", questions_of(toys.records))

    def settings(kind: str = "dense", **parallel):
        return {
            "model": {"hf": str(toys.folder(kind)), "load": str(toys.checkpoint(kind))},
            "data": {"eval": str(data)},
            "parallel": parallel,
            "train": {"precision": "fp32"},
        }

    return settings


SAMPLING = {"max_new_tokens": 10, "temperature": 0.7, "top_k": 50, "banned": (3,)}


@pytest.fixture(scope="session")
def sampled(asked, world1):
    """Three answers to each prompt on one process, in five places."""
    return together(world1.run(sample, asked(), SAMPLING))


def assert_near(ours: list[float], theirs: torch.Tensor, temperature: float = 1.0) -> None:
    """1e-5 of a logit, which is divided by the temperature: float32, attention in two parts, products of other shapes.

    The largest difference of 240 is 8.5e-6. A number such as -8.1 is itself stored to 5e-7, hence the relative part.
    """
    torch.testing.assert_close(torch.tensor(ours).double(), theirs.double(), atol=1e-5 / temperature, rtol=1e-6)


def test_logprobs_are_those_of_a_forward_pass(asked, sampled, world1):
    (found,) = world1.run(forward, asked(), sampled, SAMPLING["temperature"])
    assert sorted(found) == list(range(PROMPTS))
    for index, of_prompt in found.items():
        for answer, (logprobs, policy) in zip(sampled[index], of_prompt, strict=True):
            assert_near(answer.logprobs, logprobs)
            assert_near(answer.policy_logprobs, policy, SAMPLING["temperature"])
            # drawn from 50 tokens, each is more probable than among all
            assert all(s > p for s, p in zip(answer.sampled_logprobs, answer.policy_logprobs, strict=True))
            assert 3 not in answer.tokens
    assert len({tuple(answer.tokens) for answers in sampled.values() for answer in answers}) == 3 * PROMPTS


CASES = {
    "TP2": (2, {"tensor": 2}),
    "DP2": (2, {}),
    "PP2 VPP2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "CP2": (2, {"context": 2}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_layout_samples_the_same(case, asked, sampled, request):
    size, parallel = CASES[case]
    answers = together(request.getfixturevalue(f"world{size}").run(sample, asked(**parallel), SAMPLING))
    assert tokens_of(answers) == tokens_of(sampled)
    for index, of_prompt in answers.items():
        for one, other in zip(of_prompt, sampled[index], strict=True):
            for name in ("logprobs", "policy_logprobs", "sampled_logprobs"):
                assert_near(getattr(one, name), torch.tensor(getattr(other, name)), SAMPLING["temperature"])


def test_answers_do_not_depend_on_what_shares_their_batch(asked, sampled, world1):
    order = (5, 0, 7, 2, 1, 6, 3, 4)
    for options in ({"places": 1}, {"places": 64, "prompt_tokens": 10**6}, {"order": order, "places": 2}):
        answers = together(world1.run(sample, asked(), SAMPLING, **options))
        assert tokens_of(answers) == tokens_of(sampled)


def exact(settings: dict) -> tuple[float, int]:
    """In batch-invariant mode: the largest difference between sampling and the forward pass of training."""
    from megavlm.platform.batch_invariant import batch_invariant
    from megavlm.rollout.engine import Prompt, Sampling
    from megavlm.runtime.feed import Feed
    from megavlm.runtime.forward import encode_window, forward_chunk

    session, renderer, samples = start(settings)
    prompts = [Prompt(samples[i], seeds_of(i, 2)) for i in (3, 0, 5)]
    engine = engine_of(session, renderer, places=3, batch_invariant=True)
    answered = list(engine.generate(iter(prompts), Sampling(5, temperature=1.0)))
    session.vlm.train()
    packed = [with_answer(one.prompt.sample, a.tokens) for one in answered for a in one.answers]
    with batch_invariant():
        row = renderer.pack(packed, sum(len(one.input_ids) for one in packed))
        feed = Feed(session.vlm, iter([row]))
        (micro_batch,) = (window := next(feed.windows(feed.rows(1), 1))).micro_batches
        encode_window(session.vlm, window)
        model = session.vlm.language[0]
        logprobs, _ = model.token_logprobs(forward_chunk(session.vlm, model, micro_batch), micro_batch.targets, 64)
    assert logprobs.requires_grad
    of_engine = torch.tensor([value for one in answered for a in one.answers for value in a.policy_logprobs])
    of_model = torch.tensor([value for one in answered for a in one.answers for value in a.logprobs])
    assert torch.equal(of_engine, of_model)
    return (of_engine - logprobs[0]).abs().max().item(), len(of_engine)


def test_in_batch_invariant_mode_sampling_and_training_agree_to_the_bit(asked, world1):
    ((difference, count),) = world1.run(exact, asked())
    assert count > 20
    assert difference == 0.0


def stopped(settings: dict, stop: str) -> dict[int, list]:
    """Texts and finish reasons of greedy answers that end at ``stop``."""
    from megavlm.rollout.engine import Prompt, Sampling

    session, renderer, samples = start(settings)
    prompts = iter([Prompt(one, (0,)) for one in samples]) if session.groups.is_leader else None
    sampling = Sampling(10, stop_strings=(stop,) if stop else ())
    decode = renderer.processor.tokenizer.decode
    return {
        one.prompt.sample.index: (decode(one.answers[0].tokens, skip_special_tokens=True), one.answers[0].finish)
        for one in engine_of(session, renderer).generate(prompts, sampling)
    }


def test_stop_strings_end_answers_on_all_stages(asked, world1, world2):
    (whole,) = world1.run(stopped, asked(), "")
    text = whole[0][0]
    stop = text[len(text) // 2 - 1 : len(text) // 2 + 2]  # most likely begins within a token
    (found,) = world1.run(stopped, asked(), stop)
    assert found[0][1] == "stop"
    for index, (text, finish) in found.items():
        assert (finish == "stop") == (stop in whole[index][0])
        assert whole[index][0].startswith(text.rstrip("\ufffd"))
        assert stop not in text[:-1] or finish == "stop"
    assert world2.run(stopped, asked(pipeline=2), stop) == [found, {}]


def too_long(settings: dict, broken: bool) -> tuple[int, str]:
    """A prompt for which there is too little memory, or that cannot be read, on the last data rank.

    Returns the number of prompts that were answered, and the error.
    """
    from megavlm.rollout.engine import Prompt, Sampling

    session, renderer, samples = start(settings)
    shortest, *_, longest = sorted(samples, key=lambda one: len(one.input_ids))

    def prompts():
        yield Prompt(shortest, (1,))
        if session.groups.dp_rank == session.groups.dp_size - 1:
            if broken:
                raise ValueError("this line is torn")
            yield Prompt(longest, (1,))

    mine = prompts() if session.groups.is_leader else None
    answered = []
    engine = engine_of(session, renderer, cache_gib=3 * BLOCK_GIB)
    with pytest.raises(Exception) as caught:  # noqa: PT011 (the caller looks at it)
        answered.extend(engine.generate(mine, Sampling(16, temperature=1.0)))
    return len(answered), str(caught.value)


BLOCK_GIB = 2 * 4 * 2 * 32 * 4 * 16 / 2**30  # of the toy: keys and values, layers, heads, head_dim, bytes, tokens


def test_a_prompt_that_cannot_be_answered_is_an_error_on_all_ranks(asked, world2):
    """The others are answered. With pipeline stages and context-parallel ranks only the leader has results."""
    for parallel, counts in (({}, [1, 1]), ({"pipeline": 2}, [1, 0]), ({"context": 2}, [1, 0])):
        results = world2.run(too_long, asked(**parallel), False)
        assert [count for count, _ in results] == counts
        for _, error in results:
            assert re.search(r"asked.jsonl:5: the prompt has \d+ tokens; .* but generate.cache_gib is 9.16e-05", error)
    assert world2.run(too_long, asked(), True) == [(1, "this line is torn")] * 2


def test_ranks_without_prompts_end_with_the_others(asked, sampled, world2):
    """Also if their experts are needed."""
    alone = world2.run(sample, asked(), SAMPLING, order=[4])
    assert tokens_of(alone[0]) == {4: tokens_of(sampled)[4]}
    assert alone[1] == {}
    one = world2.run(sample, asked("moe", expert=2), SAMPLING, order=[4])
    assert one[1] == {}
    both = together(world2.run(sample, asked("moe", expert=2), SAMPLING, order=[2, 4], places=2))
    assert tokens_of(both)[4] == tokens_of(one[0])[4]


def leave(settings: dict) -> tuple[int, dict[int, list]]:
    """Leaves at the second look, as only the last rank wants. Returns how many prompts were answered by then.

    Then the same engine answers all of them.
    """
    import torch.distributed as dist

    from megavlm.base.stop_signals import StepLeft
    from megavlm.rollout.engine import Prompt, Sampling

    session, renderer, samples = start(settings)
    groups, looks = session.groups, []

    def leaves() -> bool:
        looks.append(0)
        return dist.get_rank() == dist.get_world_size() - 1 and len(looks) == 2

    mine = [Prompt(samples[i], seeds_of(i, 3)) for i in range(groups.dp_rank, PROMPTS, groups.dp_size)]
    ask = lambda: engine.generate(iter(mine) if groups.is_leader else None, Sampling(**SAMPLING))
    engine, before = engine_of(session, renderer, leaves=leaves), []
    with pytest.raises(StepLeft):
        before.extend(ask())
    return len(before), {one.prompt.sample.index: one.answers for one in ask()}


@pytest.mark.parametrize("case", [*CASES, "EP2"])
def test_all_ranks_leave_when_one_wants_to(case, asked, sampled, world2):
    """Nothing that a stage has sent stays behind: the next answers are what they always were.

    Data ranks that share no experts finish their own prompts first.
    """
    settings = asked("moe", expert=2) if case == "EP2" else asked(**CASES[case][1])
    counts, answers = zip(*world2.run(leave, settings), strict=True)
    assert counts[1] < PROMPTS // 2
    assert counts[0] == PROMPTS // 2 if case == "DP2" else counts[0] < PROMPTS // 2
    expected = together(world2.run(sample, settings, SAMPLING)) if case == "EP2" else sampled
    assert tokens_of(together(answers)) == tokens_of(expected)
