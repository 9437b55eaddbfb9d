"""Results of operators on the meta device that are known from an earlier call are as the first one."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from megavlm.tracing import known_shapes
from megavlm.tracing.known_shapes import KnownShapes

META = torch.device("meta")


def described(value: Tensor | tuple) -> list:
    tensors = [value] if isinstance(value, Tensor) else list(value)
    return [(t.shape, t.stride(), t.dtype, t.device, t.untyped_storage().nbytes(), t.requires_grad) for t in tensors]


CASES = {
    "sum of two dtypes": lambda d: torch.ones(3, 4, dtype=torch.bfloat16, device=d) + torch.ones(4, device=d),
    "number and truth": lambda d: (torch.ones(3, device=d) * 2, torch.ones(3, device=d) * True),
    "transposed": lambda d: torch.relu(torch.ones(3, 4, device=d).t()),
    "view": lambda d: torch.ones(3, 4, device=d).view(12),
    "several": lambda d: torch.topk(torch.ones(5, 6, device=d), 2, dim=1),
    "norm": lambda d: functional.rms_norm(torch.ones(2, 8, device=d), (8,)),
    "cat": lambda d: torch.cat([torch.ones(2, 3, device=d), torch.ones(4, 3, device=d)]),
    "half of a storage": lambda d: torch.ones(4, 6, device=d)[:, 3:] + 1,
    "to float": lambda d: torch.ones(2, 2, dtype=torch.bfloat16, device=d).float(),
    "written to": lambda d: torch.ones(2, 3, device=d).add_(1),
    "turned in place": lambda d: torch.ones(2, 3, device=d).t_(),
    "squeezed in place": lambda d: (torch.ones(2, 1, device=d).squeeze_(), torch.ones(2, 3, device=d).squeeze_()),
    "resized in place": lambda d: torch.ones(2, 3, device=d).resize_(4, 4),
}


@pytest.mark.parametrize("name", CASES)
def test_a_known_result_is_as_the_first_and_as_a_real_one(name) -> None:
    real, plain = described(CASES[name]("cpu")), described(CASES[name](META))
    for place in range(2):
        with KnownShapes():
            again = described(CASES[name](META))
        assert again == plain, place
    assert [(shape, stride, dtype) for shape, stride, dtype, *_ in real] == [one[:3] for one in plain]


def test_gradients_are_as_without(monkeypatch) -> None:
    def run() -> list:
        weight = torch.ones(4, 8, device=META, requires_grad=True)
        functional.silu(torch.ones(2, 8, device=META) @ weight.t()).sum().backward()
        return described(weight.grad)

    plain = run()
    monkeypatch.setattr(known_shapes, "_known", {})
    for _ in range(2):
        with KnownShapes():
            assert run() == plain
    assert known_shapes._known, "nothing was remembered"


def test_another_storage_is_not_remembered() -> None:
    for _ in range(2):
        tensor, other = torch.ones(3, device=META), torch.ones(3, device=META)
        with KnownShapes():
            tensor.set_(other)
        assert tensor.untyped_storage()._cdata == other.untyped_storage()._cdata


def test_a_view_that_does_not_say_so_shares_memory_each_time() -> None:
    for _ in range(3):
        values = torch.ones(3, 4, device=META)
        with KnownShapes():
            view = torch.ops.aten._unsafe_view(values, [12])
        assert view.untyped_storage()._cdata == values.untyped_storage()._cdata
