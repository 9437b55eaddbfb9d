"""`megavlm score` gives transformers' own log-probabilities, and every part of the model matters for them."""

import functools
import json
from unittest import mock

import pytest
import torch
from parity import mostly_slow, targets_of
from test_generate import WITH_FRAMES
from test_layouts import LAYOUTS
from test_preference import first_head
from toy import reference_inputs, reference_model, write_records

SEQ_LENGTH = 256


def score_settings(folder, checkpoint, data, output, parallel=None, vision=None):
    return {
        "model": {"hf": str(folder), "load": str(checkpoint)},
        "data": {"eval": str(data), "seq_length": SEQ_LENGTH, "workers": 0},
        "parallel": parallel or {},
        "vision": vision or {},
        "train": {"precision": "fp32", "logprob_chunk_tokens": 10},
        "output": str(output),
    }


def run_score(settings: dict):
    """The verb's own entry point."""
    from megavlm.commands import score
    from megavlm.config.settings import Settings

    return score.main(Settings(**settings))


def run_reward(settings: dict):
    """``--reward`` with a head that is not in the checkpoint but set here."""
    from megavlm.commands import score
    from megavlm.config.settings import Settings

    def start(*args, **kwargs):
        session = real_start(*args, **kwargs)
        for chunk in session.vlm.language:
            if chunk.post_process:
                chunk.score_head.weight.data.copy_(first_head(chunk.score_head.weight.shape[1]))
        return session

    real_start = score.start
    with mock.patch.multiple(score, start=start, has_score_head=lambda load: True):
        return score.main(Settings(**settings), reward=True)


def score_without(settings: dict, part: str | None) -> list[dict]:
    """Scores with one part of the model switched off."""
    from toy import read_samples

    from megavlm.config.settings import Settings
    from megavlm.data.renderer import Renderer
    from megavlm.runtime.eval_rows import EvalRows
    from megavlm.runtime.forward import forward_only
    from megavlm.runtime.scoring import fill_rows, row_logprobs, sample_scores
    from megavlm.runtime.session import start

    settings = Settings(**settings)
    session = start(settings, training=False)
    model = session.vlm.language[0]
    if part == "deepstack":
        for merger in session.vlm.projector.deepstack:
            merger.linear_fc2.weight.data.zero_()
            merger.linear_fc2.bias.data.zero_()
    elif part == "interleaving":
        time, height, width = session.shapes.text.mrope_section
        model.rope.axis.copy_(torch.tensor([0] * time + [1] * height + [2] * width))
    elif part == "q/k norm":
        for layer in model.decoder.layers:
            layer.self_attention.q_layernorm = layer.self_attention.k_layernorm = torch.nn.Identity()
    renderer = Renderer(settings.model.hf, settings.data)
    samples = iter(read_samples(settings.data.eval[0].path, renderer, "tune"))
    rows = EvalRows(session, fill_rows(samples, renderer, settings.data), "scoring")
    scores = []
    for window, _ in rows:
        if part == "position interpolation":  # the nearest corner alone
            nearest = window.frames.pos_weight.argmax(1)
            window.frames.pos_weight = torch.nn.functional.one_hot(nearest, 4).float()
        (row,) = forward_only(session.vlm, window, lambda *what: row_logprobs(*what, session.groups, 64))
        scores += sample_scores(window.micro_batches[0].host, row)
    return scores


@functools.cache
def toy_scores(toys, kind: str, dtype=torch.float32) -> list[torch.Tensor]:
    """Those of a toy model, computed once for all layouts."""
    return reference_scores(toys.folder(kind), toys.records, toys.root, dtype)


def reference_scores(folder, records, root, dtype=torch.float32) -> list[torch.Tensor]:
    from transformers import AutoProcessor

    model, processor = reference_model(folder).to(dtype), AutoProcessor.from_pretrained(folder)
    scores = []
    for record in records:
        inputs, where = reference_inputs(processor, record, root), targets_of(processor, record, root)
        with torch.no_grad():
            logprobs = model(**inputs).logits[0].float().log_softmax(-1)
        scores.append(logprobs[where - 1, inputs["input_ids"][0, where]])
    return scores


def largest_difference(scores: list[dict], reference: list[torch.Tensor]) -> float:
    assert [score["index"] for score in scores] == list(range(len(reference)))
    assert [score["tokens"] for score in scores] == [len(values) for values in reference]
    return max(
        (torch.tensor(score["logprobs"]) - values).abs().max().item()
        for score, values in zip(scores, reference, strict=True)
    )


@pytest.fixture(scope="session")
def data(toys):
    return write_records(toys.root / "eval.jsonl", toys.records)


# name: (processes, model, parallel settings); those of the training steps, and what only matters here
CASES = {
    "dense, untied": (1, "dense-untied", {}),
    "MoE, tied": (1, "moe-tied", {}),
    "tied by config.json, another output layer": (1, "dense-other-output", {}),
    "YaRN": (1, "yarn", {}),
    **LAYOUTS,
    "dense, untied, PP2": (2, "dense-untied", {"pipeline": 2}),
    "TP2 without sequence parallelism": (2, "dense", {"tensor": 2, "sequence": False}),
    "PP2, 3 + 1 layers": (2, "dense", {"pipeline": 2, "first_stage_layers": 3}),
    "PP4, single layers": (4, "dense", {"pipeline": 4}),
    "CP4": (4, "dense", {"context": 4}),
    "PP2 × DP2": (4, "dense", {"pipeline": 2}),
    "CP2 × PP2 × VPP2": (4, "dense", {"context": 2, "pipeline": 2, "virtual_pipeline": 2}),
    "TP2 × CP2 without sequence parallelism": (4, "dense", {"tensor": 2, "context": 2, "sequence": False}),
    "MoE EP2 × CP2 × DP2": (4, "moe", {"expert": 2, "context": 2}),
    "YaRN, CP2 × PP2": (4, "yarn", {"context": 2, "pipeline": 2}),
    **WITH_FRAMES,
}
# Of the layouts that encode the frames in another way, one of each kind is quick.
SLOW = WITH_FRAMES.keys() - {"DP2, frames over the world", "PP2, windows of 2"}


@pytest.mark.parametrize("case", mostly_slow(CASES, lambda case: case not in SLOW))
def test_scores_are_those_of_transformers(case, toys, data, tmp_path, request):
    size, kind, *layout = CASES[case]
    settings = score_settings(toys.folder(kind), toys.checkpoint(kind), data, tmp_path, *layout)
    assert request.getfixturevalue(f"world{size}").run(run_score, settings) == [0] * size
    scores = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    difference = largest_difference(scores, toy_scores(toys, kind))
    print(f"\n| {case} | {difference:.1e} |")
    # Log-probabilities near -10 in float32 after 4 + 4 layers: a few units in the last place, 1e-6 each.
    assert difference < (1e-5 if kind == "yarn" else 1e-4)
    assert all(score["sum"] == pytest.approx(sum(score["logprobs"]), abs=1e-4) for score in scores)


def test_bf16_is_as_close_to_float32_as_in_transformers(toys, data, tmp_path, world1):
    """Both round to bf16 at about the same places, so their errors have about the same size, but are not the same."""
    settings = score_settings(toys.folder("dense"), toys.checkpoint("dense"), data, tmp_path)
    settings["train"]["precision"] = "bf16"
    assert world1.run(run_score, settings) == [0]
    lines = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    ours = torch.cat([torch.tensor(line["logprobs"]) for line in lines])
    exact, theirs = (torch.cat(toy_scores(toys, "dense", dtype)) for dtype in (torch.float32, torch.bfloat16))
    rms = lambda scores: (scores - exact).square().mean().sqrt().item()
    print(f"\n| bf16 - float32, rms of {len(ours)} | {rms(ours):.1e} | transformers {rms(theirs):.1e} |")
    # The error of a log-probability is one draw, so an rms of n of them varies by 1 / √(2n): some 6 % of each here.
    assert 0 < rms(ours) < 1.1 * rms(theirs)


@pytest.fixture(scope="session")
def rewards(toys) -> list[float]:
    """The head's product with transformers' hidden state at the last target of each sample."""
    from transformers import AutoProcessor

    folder, found = toys.folder("dense"), []
    model, processor = reference_model(folder), AutoProcessor.from_pretrained(folder)
    for record in toys.records:
        inputs, where = reference_inputs(processor, record, toys.root), targets_of(processor, record, toys.root)
        with torch.no_grad():
            hidden = model.model(**inputs).last_hidden_state[0, where[-1]]
        found.append((hidden * first_head(len(hidden))[0]).sum().item())
    return found


@pytest.mark.parametrize("name", ["TP2 × PP2", "CP2 × PP2 × VPP2"])
def test_rewards_are_those_of_the_last_stage(name, toys, data, tmp_path, world4, rewards):
    settings = score_settings(toys.folder("dense"), toys.checkpoint("dense"), data, tmp_path, CASES[name][2])
    assert world4.run(run_reward, settings) == [0] * 4
    scores = [json.loads(line)["score"] for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    # Sums over some 64 products near 1, in float32 after 4 + 4 layers: a few 1e-6.
    assert scores == pytest.approx(rewards, abs=1e-4)


@pytest.mark.parametrize("part", ["deepstack", "interleaving", "position interpolation", "q/k norm"])
def test_every_part_matters(part, toys, data, tmp_path, world1):
    settings = score_settings(toys.folder("dense"), toys.checkpoint("dense"), data, tmp_path)
    reference = toy_scores(toys, "dense")
    (scores,) = world1.run(score_without, settings, part)
    assert largest_difference(scores, reference) > 100 * 1e-4
