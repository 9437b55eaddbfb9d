"""Log-probabilities from bfloat16 weights: logits in float32, and gradients summed in Megatron's gradient buffer."""

import pytest
import torch

TOKENS, HIDDEN, VOCABULARY, CHUNK = 48, 256, 512, 8


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """bfloat16 hidden states [T, hidden] and output weight [vocabulary, hidden], and labels [T].

    All logits are around 40, where neighbours in bfloat16 are 0.25 apart; those of a token differ by about 1.
    """
    source = torch.Generator().manual_seed(4)
    hidden = torch.randn(TOKENS, HIDDEN, generator=source)
    common = torch.randn(HIDDEN, generator=source)
    common *= 40**0.5 / common.norm()
    weight = 0.06 * torch.randn(VOCABULARY, HIDDEN, generator=source) + common
    hidden += common
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=source)
    return hidden.bfloat16(), weight.bfloat16(), labels


def on_a_rank(buffer: bool, kl: bool = False) -> dict[str, torch.Tensor]:
    """Runs on every rank: log-probabilities or divergences, and gradients; with a gradient buffer that holds ones."""
    import torch.distributed as dist

    from megavlm.model.targets import Targets
    from megavlm.model.token_logprobs import token_kl, token_logprobs

    hidden, weight, labels = inputs()
    hidden = hidden.requires_grad_()
    weight = torch.nn.Parameter(weight)
    if buffer:
        weight.main_grad = torch.ones(weight.shape)
        weight.grad_added_to_main_grad = False
    targets = Targets.of(labels, torch.ones(TOKENS), 1, 0, torch.device("cpu"))
    options = dict(sequence_parallel=False, chunk_tokens=CHUNK)
    if kl:
        values = token_kl(
            hidden, weight, hidden.detach().flip(1), weight.detach(), targets, dist.group.WORLD, **options
        )
    else:
        values, _ = token_logprobs(hidden, weight, targets, dist.group.WORLD, **options)
    values.sum().backward()
    found = {"values": values.detach()[0], "states": hidden.grad, "for autograd": weight.grad}
    return found | ({"weight": weight.main_grad, "added": weight.grad_added_to_main_grad} if buffer else {})


def in_float64(kl: bool = False) -> dict[str, torch.Tensor]:
    hidden, weight, labels = inputs()
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logs = (hidden @ weight.t()).log_softmax(-1)
    values = logs.gather(1, labels[:, None])[:, 0]
    if kl:
        start = (hidden.detach().flip(1) @ weight.detach().t()).log_softmax(-1)
        values = (logs.exp() * (logs - start)).sum(-1)
    values.sum().backward()
    return {"values": values.detach(), "states": hidden.grad, "weight": weight.grad}


def rms(x: torch.Tensor) -> float:
    return x.double().square().mean().sqrt().item()


@pytest.mark.parametrize("kl", [False, True], ids=["log-probabilities", "divergence"])
def test_logits_are_not_rounded(kl, world1):
    expected = in_float64(kl)
    hidden, weight, labels = inputs()
    assert 32 < (hidden.double() @ weight.double().t()).median() < 64
    found = world1.run(on_a_rank, False, kl)[0]
    # products of bfloat16 are exact in float32; sums of 256 of them, of size 50, keep about 6 digits
    assert rms(found["values"] - expected["values"]) < 3e-5
    rounded = (hidden @ weight.t()).float()
    if not kl:
        rounded = rounded.log_softmax(-1).gather(1, labels[:, None])[:, 0]
        assert rms(rounded - expected["values"]) > 0.03  # what a product in bfloat16 would leave


@pytest.mark.parametrize("kl", [False, True], ids=["log-probabilities", "divergence"])
def test_the_weight_s_gradient_is_added_to_the_buffer(kl, world1):
    """To what is there already, and without rounding to bfloat16 after each chunk or at the end."""
    expected, found = in_float64(kl), world1.run(on_a_rank, True, kl)[0]
    assert found["added"] is True
    assert found["for autograd"].shape == found["weight"].shape  # a stand-in, which Megatron's DDP must be called with
    added = found["weight"].double() - 1
    # the logits' gradients are rounded to bfloat16 (8 bits, so by at most 2^-9 of each), as tensor cores need them
    assert rms(added - expected["weight"]) < 2**-9 * rms(expected["weight"])
    # here such roundings are multiplied by what all rows of the weight have in common, which cancels without them
    assert rms(found["states"].double() - expected["states"]) < 2**-6 * rms(expected["states"])
