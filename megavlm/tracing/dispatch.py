"""Operators of torch as they are called: carried out in one way, and shown to what counts them.

Several of torch's own modes inside each other send each operator through the dispatcher once more for each of them.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Dispatch(TorchDispatchMode):
    """Within the block, operators go through ``carry_out``, and ``see`` gets each of them with its result.

    The operators of a backward pass do, too.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # no traced code is compiled, and to say so at each operator takes longer than a small operator

    def carry_out(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The result of an operator."""
        return func(*args, **kwargs)

    def see(self, func: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        """Is called behind an operator."""

    def __torch_dispatch__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = self.carry_out(func, args, kwargs)
        self.see(func, args, kwargs, result)
        return result


class Together(Dispatch):
    """Several in one: the first carries operators out, and all the others see them."""

    def __init__(self, first: Dispatch, *others: Dispatch):
        super().__init__()
        self.carry_out = first.carry_out  # type: ignore[method-assign]
        self._others = [one.see for one in others]

    def see(self, func: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        for see in self._others:
            see(func, args, kwargs, result)
