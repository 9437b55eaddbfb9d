"""Answers that a sampler may well give: empty, endless, made of special tokens, with a literal <image>; odd groups."""

import shutil
from pathlib import Path

import forked_command
import pytest
import torch
from parity import check_update, settings_of
from safetensors.torch import load_file, save_file
from test_grpo import grpo  # noqa: F401
from test_policy_step import GROUP, LOSSES, MOST, PROMPTS, expected, given, start_of, step_in_layout, weights_of
from toy import toy_records
from transformers import AutoTokenizer

from megavlm.demo.model_folder import SPECIAL_TOKENS
from megavlm.monitor.metrics import read_metrics
from megavlm.monitor.rollout_log import read_rollouts

BANNED = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
ENDS = ("<|im_end|>", "<|endoftext|>")


def odd(tokenizer) -> list[list[tuple[list[int], list[float], float]]]:
    """As ``given``, but the first answers to each prompt are odd."""
    tokens_of = lambda text: tokenizer(text)["input_ids"]
    texts = [
        "<|im_end|>",
        "<|im_start|><|vision_start|><|vision_end|><|box_start|><|im_start|><|im_end|>",
        "<image><|im_end|>",
        "<|im_start|>" * MOST,
    ]
    groups = given()
    for group, text in zip(groups, texts, strict=True):
        tokens = tokens_of(text)[:MOST]
        group[0] = (tokens, [-6.0 - n / 3 for n in range(len(tokens))], group[0][2])
    assert [len(groups[n][0][0]) for n in (0, 1, 3)] == [1, 6, MOST]
    return groups


@pytest.mark.parametrize("loss", ["grpo", "gspo"])
def test_odd_answers_are_learned_as_in_plain_pytorch(loss, toys, world1):
    """A picture that an answer spells out is no picture. Bounds as in test_policy_step."""
    folder, (align, temperature, lr) = toys.folder("dense"), LOSSES[loss]
    groups = odd(AutoTokenizer.from_pretrained(folder))
    losses, wanted, weights = expected(toys, "dense", loss, groups=groups)
    settings = settings_of(folder, {}, seq_length=512, lr=lr)
    settings["model"]["load"] = str(toys.checkpoint("dense"))
    settings["train"]["global_batch_size"] = None
    settings["align"] = {"loss": loss, "updates": 2, **align}
    settings["rollout"] = {"group_size": GROUP, "max_new_tokens": MOST, "temperature": temperature}
    ranks = world1.run(step_in_layout, settings, toys.root, [toys.records[n] for n in PROMPTS], groups)
    found, norms, _, fields, _ = ranks[0]
    assert found == pytest.approx(sum(losses) / 2, rel=1e-5)
    for part in ("vision", "projector", "language"):
        assert norms[f"grad_norm/{part}"] == pytest.approx(wanted[part], rel=3e-5), part
    check_update(weights_of(ranks, folder), weights, start_of(folder))
    assert fields["mismatch_max"] == pytest.approx(wanted["mismatch_max"], rel=1e-4)


def talkative(folder: Path, out: Path) -> Path:
    """A copy of an untied toy that mostly says special tokens, which often ends at once and often never.

    One channel of all embeddings is so large that it decides the last layer's output, whose norm is that of the width:
    a weight in the output layer is the logit of its token but for this factor.
    """
    shutil.copytree(folder, out)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    embedding, norm = (weights[f"model.language_model.{name}.weight"] for name in ("embed_tokens", "norm"))
    count, width = embedding.shape
    shares = torch.full((count,), 0.3 / count)  # of words, and of ids that no token has
    for tokens, share in ((SPECIAL_TOKENS, 0.5), (BANNED, 0.5), (ENDS, 0.2)):
        ids = tokenizer.convert_tokens_to_ids(list(tokens))
        shares[ids] = share / len(ids)
    embedding[:, 0], norm[0] = 100.0, 1.0
    weights["lm_head.weight"][:, 0] = shares.log() / width**0.5
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_a_model_that_says_special_tokens(grpo, toys, tmp_path):  # noqa: F811
    """Sampled, judged, learned and shown: nothing of it is taken for a picture, a turn, or the end of the page."""
    model = talkative(toys.folder("dense-untied"), tmp_path / "talkative")
    output = tmp_path / "run"
    overrides = ["train.steps=2", "train.warmup_steps=0", "rollout.temperature=1.0", "rollout.group_size=8"]
    overrides += ["rollout.log_every=1", "data.workers=0", f"model.hf={model}", f"model.load={model}"]
    result = forked_command.run(grpo(output, overrides))
    assert result.returncode == 0, result.stdout + result.stderr
    groups = [group for step in read_rollouts(output) for group in step.groups]
    answers = [answer for group in groups for answer in group.answers]
    assert len(answers) == 2 * 4 * 8
    texts = [answer.text for answer in answers]
    assert not [text for text in texts if any(token in text for token in BANNED)]
    assert sum(text in ENDS and answer.tokens == 1 for text, answer in zip(texts, answers, strict=True)) >= 3
    assert sum(answer.finish == "length" for answer in answers) >= 3
    assert sum("<|im_start|>" in text for text in texts) >= 3
    assert not (output / "reward_failures.jsonl").exists()
    for line in read_metrics(output):
        assert line["mismatch_max"] < 1e-4  # as of other answers (test_grpo.py)
        assert 0 < line["grad_norm"] < float("inf")
        assert line["reward_failures"] == 0
    page = (output / "report.html").read_text()
    assert '<i class="token">&lt;|im_start|&gt;</i>' in page


GROUPS = ("is right", "is wrong", "raises", "is fine")


def test_groups_that_are_all_right_all_wrong_or_all_failed(grpo, toys, tmp_path):  # noqa: F811
    """They have advantages of exactly 0 or none at all, so that the update is that of the only group with a spread."""
    records = [{**record, "trouble": kind} for record, kind in zip(toy_records(toys.root), GROUPS, strict=False)]
    output = tmp_path / "odd"
    overrides = ["train.steps=1", "train.warmup_steps=0", "rollout.prompts=4", "align.beta=0", "data.workers=0"]
    overrides += ["rollout.log_every=1", "data.shuffle=false"]
    result = forked_command.run(grpo(output, overrides, records, "troublesome"))
    assert result.returncode == 0, result.stdout + result.stderr
    groups = {GROUPS[int(group.sample.rpartition(":")[2]) - 1]: group for group in read_rollouts(output)[0].groups}
    of = {kind: [(answer.reward, answer.advantage) for answer in group.answers] for kind, group in groups.items()}
    assert of["is right"] == [(1.0, 0.0)] * 3
    assert of["is wrong"] == [(0.0, 0.0)] * 3
    assert of["raises"] == [(None, None)] * 3
    assert len({advantage for _, advantage in of["is fine"]}) > 1
    line = read_metrics(output)[0]
    assert line["flat_groups"] == 3 / 4
    assert line["samples"] == 3 * 3  # an answer whose reward failed is left out
    assert line["grad_norm"] > 0
    alone = tmp_path / "alone"  # without that group nothing is learned
    result = forked_command.run(grpo(alone, [*overrides, "rollout.prompts=3"], records[:3], "troublesome"))
    assert result.returncode == 0, result.stdout + result.stderr
    line = read_metrics(alone)[0]
    assert (line["loss"], line["grad_norm"], line["flat_groups"]) == (0.0, 0.0, 1.0)
