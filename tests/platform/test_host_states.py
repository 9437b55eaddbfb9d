"""Inputs of recomputed layers in host memory: values, order of the copies, memory on both sides."""

import gc
import weakref

import pytest
import torch
from late_copies import LateStream
from torch.utils.checkpoint import checkpoint

from megavlm.platform.host_states import HostStates

LAYERS = 6


class Chain(torch.nn.Module):
    """Layers that are computed again, and a norm that keeps its input."""

    def __init__(self, stream=None, on_host=True):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(LAYERS))
        self.norm = torch.nn.LayerNorm(8)
        self.states = HostStates(stream) if on_host else None
        self.inputs: list[weakref.ref] = []

    def forward(self, x):
        if self.states is None:
            return self._layers(x)
        with self.states.of(x.shape, LAYERS):
            return self._layers(x)

    def _layers(self, x):
        self.inputs = []
        for layer in self.layers:
            self.inputs.append(weakref.ref(x.untyped_storage()))
            x = checkpoint(lambda x, layer=layer: layer(x).tanh(), x, use_reentrant=True)
        return self.norm(x).square().sum()

    def gradients(self):
        found = [parameter.grad.clone() for parameter in self.parameters()]
        self.zero_grad()
        return found


def rows(count, tokens=5):
    torch.manual_seed(1)
    return [torch.randn(tokens, 1, 8).requires_grad_() for _ in range(count)]


def pieces(states):
    """Free pieces of host memory, of which a stream without copies under way needs no others."""
    gc.collect()
    return [len(room) for _, room in states._free]


@pytest.mark.parametrize("stream", [LateStream, lambda: None], ids=["late", "at once"])
def test_gradients_have_the_same_bits(stream):
    """With up to two rows between their passes, as in a pipeline. The host memory of one is used again by another."""
    plain, chain = Chain(on_host=False), Chain(stream())
    for model in (plain, chain):
        one, two, three = iter(rows(3))
        first = model(one)
        second = model(two)
        first.backward()
        third = model(three)
        second.backward()
        third.backward()
    expected, found = plain.gradients(), chain.gradients()
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
    assert pieces(chain.states) == [5 * 8 * 4] * 2 * LAYERS


def test_copies_of_a_step():
    """Each input goes to the host once. All but the last, which is still there, come back."""
    chain = Chain(LateStream())
    chain(rows(1)[0]).backward()
    assert chain.states._stream.copies == 2 * LAYERS - 1


def test_an_input_that_was_received():
    """Its sender's schedule keeps it, so that it stays on the device, and the others are copied."""
    plain, chain = Chain(on_host=False), Chain(LateStream())
    (row,) = rows(1)
    plain(row).backward()
    with chain.states.of(row.shape, LAYERS, received=True):
        loss = chain._layers(row)
    loss.backward()
    assert all(torch.equal(one, other) for one, other in zip(plain.gradients(), chain.gradients(), strict=True))
    assert chain.states._stream.copies == 2 * (LAYERS - 1) - 1
    assert len(pieces(chain.states)) == LAYERS - 1


def test_memory_of_the_device():
    """Between the passes it has the last layer's input; the caller has the first one's."""
    chain, (row,) = Chain(), rows(1)
    loss = chain(row)
    alive = [ref() is not None for ref in chain.inputs]
    assert alive == [True] + [False] * (LAYERS - 2) + [True]
    came, seen, copy = [], [], chain.states._stream.copy

    def counted(target, source):
        came.append(weakref.ref(target.untyped_storage()))
        return copy(target, source)

    chain.states._stream.copy = counted
    for layer in chain.layers:
        layer.register_forward_pre_hook(lambda *_: seen.append(sum(ref() is not None for ref in came)))
    loss.backward()
    assert seen == [1, 2, 2, 2, 2, 1]  # the input of the layer, and that of the one before, which is coming
    assert not any(ref() for ref in came), "a tensor stays on the device after the step"


def test_rows_of_other_lengths():
    """Longer rows need larger pieces, and shorter ones use them, too. A row that has no backward pass frees its own."""
    plain, chain = Chain(on_host=False), Chain(LateStream())
    for model in (plain, chain):
        model(rows(1, 3)[0]).backward()
        for lengths in (7, 5), (7, 7):
            for loss in [model(rows(1, tokens)[0]) for tokens in lengths]:
                loss.backward()
        model(rows(1, 7)[0])
        model(rows(1, 7)[0]).backward()
    assert all(torch.equal(one, other) for one, other in zip(plain.gradients(), chain.gradients(), strict=True))
    assert sorted(pieces(chain.states)) == [3 * 8 * 4] * LAYERS + [7 * 8 * 4] * 2 * LAYERS
    with torch.no_grad():
        before = chain.states._stream.copies
        chain(rows(1)[0])
    assert chain.states._stream.copies == before
