"""Transformer Engine's own Python on a CPU: what its extension computes on a GPU, answered in plain PyTorch.

In processes of their own (``server``), TE loads its extension and then this package, which TE's variable NVTE_PLUGIN
names: ``load_plugins`` puts the functions below in place of the extension's of the same names, before any other module
of TE is imported. All else is as installed: TE's modules and autograd functions, their choice of an attention backend,
and Megatron's modules over them. What it shows: names, shapes, order of arguments, fused norms, dispatch of experts,
the ring of context parallelism, checkpoints, recomputation. What it cannot show: numbers and speed of TE's kernels.

    layers.py       matrix products, norms, rotary embedding
    fp8.py          numbers in FP8, with the scales of TE's recipes
    attention.py    attention within the segments of a row, and the pieces that context parallelism puts together
    permutation.py  sorting tokens by expert
    optimizers.py   updates of many tensors at once
    device.py       questions for the device
    packages.py     where TE comes from, and the server process that has it
"""

import sys
from collections import Counter

called: Counter[str] = Counter()  # how often each answer was asked for in this process


def load_plugins() -> None:
    """TE calls this once its extension is loaded."""
    from te_cpu import attention, device, fp8, layers, optimizers

    device.pretend()
    extension = sys.modules["transformer_engine_torch"]
    for module in (attention, device, fp8, layers, optimizers):
        for answer in module.ANSWERS:
            assert hasattr(extension, answer.__name__), f"TE's extension has no {answer.__name__}"
            setattr(extension, answer.__name__, counted(answer))


def counted(answer):
    """The function, which also counts its calls in ``called``."""

    def count(*args, **kwargs):
        called[answer.__name__] += 1
        return answer(*args, **kwargs)

    return count


def calls() -> dict[str, int]:
    """Runs on a rank: how often each answer was asked for until now, in this process."""
    return dict(called)
