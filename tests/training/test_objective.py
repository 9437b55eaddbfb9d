"""The cross-entropy and its terms, from the numbers of five targets of two sources."""

from types import SimpleNamespace

import pytest
import torch

from megavlm.config.loss_section import LossSettings
from megavlm.training.objective import CrossEntropy, CrossEntropyWithKL

LOGPROBS, LOG_Z, MEANS, KL = torch.tensor(
    [[-1.0, -2.0, -3.0, -0.5, -4.0], [5.0, 6.0, 7.0, 8.0, 9.0], [1.0, 2.0, 1.0, 2.0, 1.0], [0.1, 0.2, 0.3, 0.4, 0.5]]
).unbind()
WEIGHTS = torch.tensor([1.0, 2.0, 0.0, 1.0, 0.5])
COUNTS = {"weight": 4.5, "loss_weight/a": 3.0, "loss_weight/b": 1.5}


def found(objective: CrossEntropy, *outputs: torch.Tensor) -> tuple[float, dict]:
    """The loss, and the fields for metrics.jsonl of a step with this row alone."""
    micro_batch = SimpleNamespace(
        targets=SimpleNamespace(weights=WEIGHTS[None]),
        target_samples=torch.tensor([[0, 0, 1, 2, 2]]),
        sample_sources=torch.tensor([0, 0, 1]),
    )
    loss, sums = objective.loss(torch.stack([output[None] for output in outputs]), micro_batch)
    assert len(sums) == objective.num_sums
    assert sums[0] == loss
    return loss.item(), objective.fields(sums.tolist(), COUNTS)


def test_terms_are_added_and_told_apart():
    options = LossSettings(z_loss=0.01, label_smoothing=0.2)
    nll, z_loss, kl = 1 + 4 + 0.5 + 2, 0.01 * (25 + 72 + 64 + 40.5), 0.1 + 0.4 + 0.4 + 0.25
    spread = 4 + 2 * 4 + 6 + 0.5 * 8  # log_z less the mean
    of_sources = {"loss/a": 5 / 3, "loss/b": 2.5 / 1.5}
    told = {"nll": nll / 4.5, "z_loss": z_loss / 4.5, **of_sources}
    plain = CrossEntropy(["a", "b"], 64, options)
    loss, fields = found(plain, LOGPROBS, LOG_Z, MEANS)
    assert loss == pytest.approx(0.8 * nll + 0.2 * spread + z_loss)
    assert fields == pytest.approx(told)
    with_kl, fields = found(CrossEntropyWithKL(plain, 3.0, None), LOGPROBS, LOG_Z, MEANS, KL)
    assert with_kl == pytest.approx(loss + 3 * kl)
    assert fields == pytest.approx({**told, "kl_to_start": kl / 4.5})


def test_without_terms_only_sources_are_told_apart():
    plain = CrossEntropy(["a", "b"], 64)
    assert found(plain, LOGPROBS) == (7.5, pytest.approx({"loss/a": 5 / 3, "loss/b": 2.5 / 1.5}))
    loss, fields = found(CrossEntropyWithKL(plain, 3.0, None), LOGPROBS, KL)
    assert loss == pytest.approx(7.5 + 3 * 1.15)
    assert fields["nll"] == pytest.approx(7.5 / 4.5)
