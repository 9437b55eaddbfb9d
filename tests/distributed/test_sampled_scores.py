"""What the sampler says of its tokens is what `megavlm score` computes for them, in any layout, also while training."""

from dataclasses import replace

import pytest
import torch
from parity import mostly_slow
from test_engine import PROMPTS, SAMPLING, engine_of, seeds_of, with_answer
from test_generate import WITH_FRAMES, questions_of
from toy import write_records

# name: (processes, toy model, parallel settings[, section vision]). With a section vision, the session trains, since
# the other commands share no frames.
CASES = {
    "one process": (1, "dense", {}),
    "TP2": (2, "dense", {"tensor": 2}),
    "PP2 × VPP2": (2, "dense", {"pipeline": 2, "virtual_pipeline": 2}),
    "CP2": (2, "dense", {"context": 2}),
    "MoE, one process": (1, "moe", {}),
    "MoE EP2": (2, "moe", {"expert": 2}),
    "MoE EP2 × TP2 × PP2": (4, "moe", {"expert": 2, "tensor": 2, "pipeline": 2}),
    **WITH_FRAMES,
}
QUICK = {
    *("one process", "TP2", "PP2 × VPP2", "CP2", "MoE, one process", "MoE EP2"),
    *("DP2, frames over the world", "PP2, windows of 2"),
}


def sampled_and_scored(settings: dict, training: bool) -> dict[int, tuple[list, list, list]]:
    """Runs on every rank: on leaders, by ten times the prompt and the number of its answer, the tokens, and the
    log-probabilities of engine and `megavlm score`, in one session.
    """
    from toy import read_samples

    from megavlm.config.settings import Settings
    from megavlm.data.renderer import Renderer
    from megavlm.rollout.engine import Prompt, Sampling
    from megavlm.runtime.eval_rows import EvalRows
    from megavlm.runtime.forward import forward_only, to_leader
    from megavlm.runtime.scoring import fill_rows, row_logprobs, sample_scores
    from megavlm.runtime.session import start

    settings = Settings(**settings)
    session = start(settings, training=training)
    groups, renderer = session.groups, Renderer(settings.model.hf, settings.data, settings.pad_multiple)
    prompts = read_samples(settings.data.eval[0].path, renderer, "prompt")
    mine = [Prompt(prompts[i], seeds_of(i, 2)) for i in range(groups.dp_rank, PROMPTS, groups.dp_size)]
    engine, found, rows = engine_of(session, renderer), {}, None
    answered = list(engine.generate(iter(mine) if groups.is_leader else None, Sampling(**SAMPLING)))
    if groups.is_leader:
        samples = []
        for one in answered:
            for number, answer in enumerate(one.answers):
                index = 10 * one.prompt.sample.index + number
                found[index] = answer.tokens, answer.logprobs
                samples.append(replace(with_answer(one.prompt.sample, answer.tokens), index=index))
        rows = fill_rows(iter(samples), renderer, settings.data)
    read = lambda chunk, hidden, micro_batch: row_logprobs(chunk, hidden, micro_batch, groups, 10)
    for window, real in EvalRows(session, rows, "scoring", size=settings.parallel.pipeline):
        results = to_leader(session.vlm, forward_only(session.vlm, window, read))
        for micro_batch, row in list(zip(window.micro_batches, results, strict=False))[:real]:  # none but on the leader
            for score in sample_scores(micro_batch.host, row):
                found[score["index"]] = *found[score["index"]][:2], score["logprobs"]
    return found


@pytest.fixture(scope="module")
def ask(toys, request):
    """``ask(name)``: what the ranks of a layout have found, put together; computed once."""
    data, made = write_records(toys.root / "asked.jsonl", questions_of(toys.records)), {}

    def asked(name: str) -> dict[int, tuple[list, list, list]]:
        if name not in made:
            size, kind, parallel, *vision = CASES[name]
            settings = {
                "model": {"hf": str(toys.folder(kind)), "load": str(toys.checkpoint(kind))},
                "data": {"eval": str(data), "seq_length": 512},
                "parallel": parallel,
                "vision": vision[0] if vision else {},
                "train": {"precision": "fp32"},
            }
            ranks = request.getfixturevalue(f"world{size}").run(sampled_and_scored, settings, bool(vision))
            made[name] = {index: both for rank in ranks for index, both in rank.items()}
        return made[name]

    return asked


@pytest.mark.parametrize("name", mostly_slow(CASES, QUICK.__contains__))
def test_sampled_logprobs_are_those_of_score(name, ask):
    """To 1e-5, and the rounding of numbers near -8: the largest difference is 7.6e-6. All layouts sample the same."""
    found = ask(name)
    assert len(found) == 2 * PROMPTS
    for _, sampled, scored in found.values():
        torch.testing.assert_close(torch.tensor(sampled), torch.tensor(scored), atol=1e-5, rtol=1e-6)
    alone = ask("MoE, one process" if CASES[name][1] == "moe" else "one process")
    assert {index: tokens for index, (tokens, *_) in found.items()} == {i: tokens for i, (tokens, *_) in alone.items()}
