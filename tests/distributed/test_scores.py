"""`megavlm score` gives transformers' own log-probabilities, and every part of the model matters for them."""

import json

import pytest
import torch
from parity import targets_of
from toy import reference_inputs, reference_model, write_records

SEQ_LENGTH = 256


def score_settings(folder, checkpoint, data, output, parallel=None):
    return {
        "model": {"hf": str(folder), "load": str(checkpoint)},
        "data": {"eval": str(data), "seq_length": SEQ_LENGTH},
        "parallel": parallel or {},
        "train": {"precision": "fp32", "logprob_chunk_tokens": 10},
        "output": str(output),
    }


def run_score(settings: dict):
    """The verb's own entry point."""
    from megavlm.commands import score
    from megavlm.config.settings import Settings

    return score.main(Settings(**settings))


def score_without(settings: dict, part: str | None) -> list[dict]:
    """Scores with one part of the model switched off."""
    from toy import read_samples

    from megavlm.config.settings import Settings
    from megavlm.data.renderer import Renderer
    from megavlm.runtime.eval_rows import EvalRows
    from megavlm.runtime.forward import encode_window, logprobs_of
    from megavlm.runtime.scoring import fill_rows, sample_scores
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
    samples = iter(read_samples(settings.data.eval, renderer, "tune"))
    rows = EvalRows(session, fill_rows(samples, renderer, settings.data), "scoring")
    scores = []
    for window, _ in rows:
        if part == "position interpolation":  # the nearest corner alone
            nearest = window.frames.pos_weight.argmax(1)
            window.frames.pos_weight = torch.nn.functional.one_hot(nearest, 4).float()
        with torch.no_grad():
            encode_window(session.vlm, window)
        scores += sample_scores(window.micro_batches[0].host, logprobs_of(session.vlm, window.micro_batches[0], 64))
    return scores


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


CASES = {
    "dense, tied": (1, "dense", {}),
    "dense, untied": (1, "dense-untied", {}),
    "MoE, untied": (1, "moe", {}),
    "MoE, tied": (1, "moe-tied", {}),
    "tied by config.json, another output layer": (1, "dense-other-output", {}),
    "dense, tied, TP2": (2, "dense", {"tensor": 2}),
    "dense, tied, DP2": (2, "dense", {}),
    "dense, tied, CP2": (2, "dense", {"context": 2}),
    "dense, tied, TP2 × CP2": (4, "dense", {"tensor": 2, "context": 2}),
    "MoE, untied, EP2": (2, "moe", {"expert": 2}),
    "YaRN": (1, "yarn", {}),
}


@pytest.mark.parametrize("case", CASES)
def test_scores_are_those_of_transformers(case, toys, data, tmp_path, request):
    size, kind, parallel = CASES[case]
    settings = score_settings(toys.folder(kind), toys.checkpoint(kind), data, tmp_path, parallel)
    assert request.getfixturevalue(f"world{size}").run(run_score, settings) == [0] * size
    scores = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    difference = largest_difference(scores, reference_scores(toys.folder(kind), toys.records, toys.root))
    print(f"\n| {case} | {difference:.1e} |")
    # Log-probabilities near -10 in float32 after 4 + 4 layers: a few units in the last place, 1e-6 each.
    assert difference < 1e-4
    assert all(score["sum"] == pytest.approx(sum(score["logprobs"]), abs=1e-4) for score in scores)


def test_bf16_is_as_close_to_float32_as_in_transformers(toys, data, tmp_path, world1):
    """Both round to bf16 at about the same places, so their errors have about the same size, but are not the same."""
    settings = score_settings(toys.folder("dense"), toys.checkpoint("dense"), data, tmp_path)
    settings["train"]["precision"] = "bf16"
    assert world1.run(run_score, settings) == [0]
    lines = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    ours = torch.cat([torch.tensor(line["logprobs"]) for line in lines])
    exact, theirs = (
        torch.cat(reference_scores(toys.folder("dense"), toys.records, toys.root, dtype))
        for dtype in (torch.float32, torch.bfloat16)
    )
    rms = lambda scores: (scores - exact).square().mean().sqrt().item()
    print(f"\n| bf16 - float32, rms of {len(ours)} | {rms(ours):.1e} | transformers {rms(theirs):.1e} |")
    # The error of a log-probability is one draw, so an rms of n of them varies by 1 / √(2n): some 6 % of each here.
    assert 0 < rms(ours) < 1.1 * rms(theirs)


@pytest.mark.parametrize("part", ["deepstack", "interleaving", "position interpolation", "q/k norm"])
def test_every_part_matters(part, toys, data, tmp_path, world1):
    settings = score_settings(toys.folder("dense"), toys.checkpoint("dense"), data, tmp_path)
    reference = reference_scores(toys.folder("dense"), toys.records, toys.root)
    (scores,) = world1.run(score_without, settings, part)
    assert largest_difference(scores, reference) > 100 * 1e-4
