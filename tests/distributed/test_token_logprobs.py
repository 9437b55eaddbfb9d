"""Log-probabilities at a temperature, and sums over the vocabulary, on tensor ranks: those of autograd."""

import pytest
import torch

TOKENS, HIDDEN, VOCABULARY = 12, 8, 10


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states [T, hidden], output weight [vocabulary, hidden], labels [T] and weights of the sum [T]."""
    source = torch.Generator().manual_seed(3)
    hidden, weight, factors = (torch.randn(*shape, generator=source) for shape in
                               ((TOKENS, HIDDEN), (VOCABULARY, HIDDEN), (TOKENS,)))  # fmt: skip
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=source)
    labels[[0, 5, 6, 7]] = -100
    return hidden, weight, labels, factors


def on_ranks(temperature: float | None, sequence_parallel: bool) -> dict[str, torch.Tensor]:
    """Runs on every rank: the values and gradients of ``token_logprobs``, put together to those of the whole row."""
    import torch.distributed as dist

    from megavlm.model.targets import Targets
    from megavlm.model.token_logprobs import token_logprobs

    group, size, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    hidden, weight, labels, factors = inputs()
    slices, index = (size, rank) if sequence_parallel else (1, 0)
    hidden = hidden.chunk(slices)[index].clone().requires_grad_()
    weight = weight.chunk(size)[rank].clone().requires_grad_()
    targets = Targets.of(labels, torch.ones(TOKENS), slices, index, torch.device("cpu"))
    options = {} if temperature is None else {"temperature": temperature}
    values, entropy = token_logprobs(
        hidden, weight, targets, group, sequence_parallel=sequence_parallel, chunk_tokens=4, entropy=True, **options
    )
    at, there = targets.row_index, targets.row_index >= 0
    (values * factors[at] * there).sum().backward()
    gathered = lambda x, parts: torch.cat(_all(x, size)[:parts])
    row = lambda x: torch.zeros(TOKENS).index_put((at[there],), x.detach()[there])
    return {
        "logprobs": row(values),
        "entropy": row(entropy),
        "gradient of the states": gathered(hidden.grad, slices),
        "gradient of the weight": gathered(weight.grad, size),
    }


def _all(x: torch.Tensor, size: int) -> list[torch.Tensor]:
    import torch.distributed as dist

    parts = [torch.empty_like(x) for _ in range(size)]
    dist.all_gather(parts, x)
    return parts


def by_autograd(temperature: float) -> dict[str, torch.Tensor]:
    hidden, weight, labels, factors = (x.double() if x.is_floating_point() else x for x in inputs())
    hidden.requires_grad_()
    weight.requires_grad_()
    logs, there = (hidden @ weight.t() / temperature).log_softmax(-1), labels >= 0
    values = torch.where(there, logs.gather(1, labels.clamp(min=0)[:, None])[:, 0], 0.0)
    (values * factors).sum().backward()
    entropy = torch.where(there, -(logs.exp() * logs).sum(-1), 0.0)
    return {
        "logprobs": values.detach(),
        "entropy": entropy.detach(),
        "gradient of the states": hidden.grad,
        "gradient of the weight": weight.grad,
    }


@pytest.mark.parametrize("temperature", [0.6, 1.7])
@pytest.mark.parametrize(("size", "sequence_parallel"), [(1, False), (2, False), (2, True)], ids=["one", "TP2", "SP2"])
def test_a_temperature_divides_the_logits(size, sequence_parallel, temperature, request):
    expected = by_autograd(temperature)
    for found in request.getfixturevalue(f"world{size}").run(on_ranks, temperature, sequence_parallel):
        for name, value in found.items():
            # float32 sums of ten terms of size 1 to 10, against float64
            assert torch.allclose(value.double(), expected[name], rtol=1e-5, atol=2e-5), name
    assert (expected["logprobs"] - by_autograd(1.0)["logprobs"]).abs().max() > 0.1


def test_a_temperature_of_1_changes_no_bit(world2):
    without, with_it = world2.run(on_ranks, None, True), world2.run(on_ranks, 1.0, True)
    assert all(torch.equal(value, with_it[rank][name]) for rank in range(2) for name, value in without[rank].items())


def loss_on_ranks(sequence_parallel: bool, z_loss: float, smoothing: float) -> dict[str, object]:
    """Runs on every rank: the loss of ``CrossEntropy`` with such terms, its fields, and gradients of the whole row."""
    from types import SimpleNamespace

    import torch.distributed as dist

    from megavlm.config.loss_section import LossSettings
    from megavlm.model.targets import Targets
    from megavlm.model.token_logprobs import token_logprobs
    from megavlm.training.objective import CrossEntropy

    group, size, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    hidden, weight, labels, factors = inputs()
    slices, index = (size, rank) if sequence_parallel else (1, 0)
    hidden = hidden.chunk(slices)[index].clone().requires_grad_()
    weight = weight.chunk(size)[rank].clone().requires_grad_()
    targets = Targets.of(labels, factors.abs(), slices, index, torch.device("cpu"))
    logprobs = lambda hidden, targets, chunk, sums: token_logprobs(
        hidden, weight, targets, group, sequence_parallel=sequence_parallel, chunk_tokens=chunk, sums=sums
    )
    chunk = SimpleNamespace(token_logprobs=logprobs)
    micro_batch = SimpleNamespace(
        targets=targets,
        target_samples=torch.zeros_like(targets.tokens),
        sample_sources=torch.zeros(1, dtype=torch.int64),
    )
    objective = CrossEntropy(["data"], 4, LossSettings(z_loss=z_loss, label_smoothing=smoothing))
    loss, sums = objective.loss(objective.outputs(chunk, hidden, micro_batch), micro_batch)
    loss.backward()
    assert len(sums) == objective.num_sums
    weights = factors.abs()[labels >= 0].sum().item()
    return {
        "loss": loss.detach(),
        "fields": objective.fields(sums.tolist(), {"weight": weights}),
        "gradient of the states": torch.cat(_all(hidden.grad, size)[:slices]),
        "gradient of the weight": torch.cat(_all(weight.grad, size)),
    }


@pytest.mark.parametrize(("z_loss", "smoothing"), [(0.3, 0.0), (0.0, 0.2), (0.3, 0.2)], ids=["z", "smooth", "both"])
@pytest.mark.parametrize(("size", "sequence_parallel"), [(1, False), (2, False), (2, True)], ids=["one", "TP2", "SP2"])
def test_z_loss_and_label_smoothing(size, sequence_parallel, z_loss, smoothing, request):
    """As torch's own cross_entropy smooths, and the square of logsumexp."""
    hidden, weight, labels, factors = (x.double() if x.is_floating_point() else x for x in inputs())
    hidden.requires_grad_()
    weight.requires_grad_()
    logits, there, factors = hidden @ weight.t(), labels >= 0, factors.abs()
    entropy = lambda smoothing: (
        factors * torch.nn.functional.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    ).sum()
    squares = (logits.logsumexp(-1).square() * factors)[there].sum()
    loss = entropy(smoothing) + z_loss * squares
    loss.backward()
    whole = factors[there].sum().item()
    for found in request.getfixturevalue(f"world{size}").run(loss_on_ranks, sequence_parallel, z_loss, smoothing):
        # float32 sums of ten terms of size 1 to 10, against float64
        assert found["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
        assert found["fields"] == pytest.approx(
            {"nll": entropy(0.0).item() / whole, "z_loss": z_loss * squares.item() / whole}, rel=1e-5, abs=1e-6
        )
        for name, expected in (("states", hidden.grad), ("weight", weight.grad)):
            assert torch.allclose(found[f"gradient of the {name}"].double(), expected, rtol=1e-5, atol=5e-5), name
