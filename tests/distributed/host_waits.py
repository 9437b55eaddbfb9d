"""Where a training step waits for the device, and what it sends: found in a world of ranks that do not exist.

In ``absent_world`` the model is on the meta device. Its tensors have no values, so code that reads a value from the
device cannot hide: torch would raise an error. ``Watch`` stands in between, notes who asked, and answers with zeros.
What it sees holds for a GPU: the same calls would wait for it. It cannot see what libraries do below torch's dispatcher
(kernels of Transformer Engine, NCCL), or that a GPU's memory is used up.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

SITE_PACKAGES = Path(torch.__file__).parents[1]
# The number of results depends on values, so that the host must wait for it.
OF_UNKNOWN_SIZE = {f"aten::{name}" for name in ("nonzero", "masked_select", "_unique2", "unique_dim")}
TO_DEVICE = "megavlm/platform/device.py:to_device"  # on a GPU it copies from page-locked memory, without waiting


def place() -> str:
    """The innermost function that is neither torch's nor of this file, as "folder/file.py:function"."""
    frame = sys._getframe(1)
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if SITE_PACKAGES / "torch" not in file.parents and file != Path(__file__) and file.suffix == ".py":
            for root in (SITE_PACKAGES, Path(__file__).parents[2]):
                if root in file.parents and "platform/cpu.py" not in str(file):
                    return f"{file.relative_to(root)}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "?"


class Watch(TorchDispatchMode):
    """Notes every wait for the device, and every collective, in its block.

    Args:
        routed: the number of (token, expert) pairs on the rank, if experts ask for numbers of tokens: each of them gets
            the same number.

    Attributes:
        waits: how often each (place, what) has waited.
        collectives: (name, device or host, ranks of the group, bytes) of each, in order.
    """

    def __init__(self, routed: int = 0) -> None:
        super().__init__()
        self._routed = routed
        self.waits: Counter[tuple[str, str]] = Counter()
        self.collectives: list[tuple[str, str, tuple[int, ...], int]] = []
        self._functions = _Functions(self)

    def __enter__(self) -> "Watch":
        self._undo = []
        for owner, name in ((torch.cuda, "synchronize"), (torch.cuda.Event, "synchronize")):
            self._undo.append((owner, name, getattr(owner, name)))
            setattr(owner, name, self._noted(name))
        self._functions.__enter__()
        return super().__enter__()

    def __exit__(self, *exc: object) -> None:
        super().__exit__(*exc)
        self._functions.__exit__(*exc)
        for owner, name, value in self._undo:
            setattr(owner, name, value)

    def _noted(self, name: str) -> Any:
        return lambda *args, **kwargs: self.note(name) or True

    def note(self, what: str) -> None:
        self.waits[place(), what] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name
        if name.startswith("c10d::"):
            self._send(name.removeprefix("c10d::").rstrip("_"), args)
        elif name == "aten::_local_scalar_dense" and args[0].is_meta:
            self.note("reads a number")
            return torch.zeros((), dtype=args[0].dtype).item()
        elif name in OF_UNKNOWN_SIZE and args[0].is_meta:
            self.note(name)
        elif name == "aten::index.Tensor" or name == "aten::index":
            if any(x is not None and x.is_meta and x.dtype in (torch.bool, torch.uint8) for x in args[1]):
                self.note("indexes by a mask")
        elif name == "aten::_to_copy" and torch.is_tensor(args[0]):
            return self._copy(func, args, kwargs)
        elif name == "aten::copy_" and args[0].is_meta != args[1].is_meta:
            waits = not (len(args) > 2 and args[2]) and not kwargs.get("non_blocking")
            if waits and place() != TO_DEVICE:
                self.note("copies from the device" if args[1].is_meta else "copies to the device")
            return args[0]
        return func(*args, **kwargs)

    def _copy(self, func: Any, args: tuple, kwargs: dict) -> Any:
        source, target = args[0], kwargs.get("device")
        if target is None or (torch.device(target).type == "meta") == source.is_meta:
            return func(*args, **kwargs)
        if source.is_meta:  # without waiting, the host may read it after it has synchronised, which is noted
            if not kwargs.get("non_blocking"):
                self.note("copies from the device")
            share = 0 if source.is_floating_point() or not source.numel() else self._routed // source.numel()
            return torch.full(source.shape, share, dtype=kwargs.get("dtype") or source.dtype)
        if not kwargs.get("non_blocking") and place() != TO_DEVICE:
            self.note("copies to the device")
        return func(*args, **kwargs)

    def _send(self, name: str, args: tuple) -> None:
        tensors, group = [], None
        for value in args:
            if torch.is_tensor(value):
                tensors.append(value)
            elif isinstance(value, list | tuple):
                for inner in value:
                    tensors += [inner] if torch.is_tensor(inner) else [t for t in _flat(inner) if torch.is_tensor(t)]
            elif isinstance(value, torch.ScriptObject) and group is None:
                try:
                    group = torch.distributed.ProcessGroup.unbox(value)
                except Exception:
                    continue
        ranks = tuple(torch.distributed.get_process_group_ranks(group)) if group is not None else ()
        on = "device" if any(t.is_meta for t in tensors) else "host"
        self.collectives.append((name, on, ranks, max((t.nbytes for t in tensors), default=0)))


def _flat(value: Any) -> list:
    return list(value) if isinstance(value, list | tuple) else []


class _Functions(TorchFunctionMode):
    """Sees what becomes a tensor of the device without the dispatcher: ``torch.tensor(numbers, device=…)``."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        where = kwargs.get("device")
        is_made = func in (torch.tensor, torch.as_tensor) and where is not None and torch.device(where).type == "meta"
        is_made = is_made and not (torch.is_tensor(args[0]) and args[0].is_meta)
        if is_made or (func is torch.Tensor.new_tensor and args[0].is_meta):
            self._watch.note("makes a tensor of numbers")
        if (
            func is torch.Tensor.__setitem__
            and args[0].is_meta
            and isinstance(args[1], int)
            and not torch.is_tensor(args[2])
        ):
            self._watch.note("assigns a number")  # on an H100 this was seen to wait; `fill_` does not
        return func(*args, **kwargs)


def _to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """``maybe_move_tensor_to_cpu`` of Megatron's dispatcher, which moves tensors of a GPU alone, on the meta device."""
    if not torch.is_tensor(tensor) or not tensor.is_meta:
        return tensor
    moved = tensor.to("cpu", non_blocking=True)
    return moved.numpy() if as_numpy else moved


@contextmanager
def nothing_kept() -> Iterator[None]:
    """Before and after the block, Megatron has no tensors of experts: they stay on the device of their first user."""
    from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    def drop() -> None:
        destroy_moe_metrics_tracker()
        MoEAuxLossAutoScaler.main_loss_backward_scale = None

    drop()
    try:
        yield
    finally:
        drop()


def watched_step(folder: Path, layout: dict, rank: int, world_size: int, **train) -> tuple[Counter, list]:
    """Runs in a process that is in no world: a whole training step of ``rank``, with pictures, in such a layout.

    Returns ``Watch.waits`` and ``Watch.collectives``, with the names of the groups in place of their ranks.
    """
    from megatron.core.transformer.moe import token_dispatcher
    from parity import settings_of

    from megavlm.align.registry import make_method
    from megavlm.config.settings import Settings
    from megavlm.optim.optimizers import Optimizers
    from megavlm.plan.dry_run import _row
    from megavlm.plan.step_memory import RowsAtHand
    from megavlm.platform import absent_world
    from megavlm.runtime.session import start
    from megavlm.training.step import Step

    train = {"optimizer": "adam", "precision": "bf16", "clip_grad": 1.0} | train
    settings = Settings(**settings_of(folder, layout, **train))
    method = make_method("sft", settings)
    with absent_world(rank, world_size):
        with torch.device("meta"):
            session = start(settings, training=True, load=False, score_head=False)
        session.vlm.decoder_config.batch_p2p_comm = False  # torch cannot batch sends of meta tensors
        count = max(settings.parallel.pipeline, 2)
        feed = RowsAtHand(session.vlm, [_row(settings, session.shapes)] * count)
        optimizers = Optimizers(session.vlm, settings.train)
        objective = method.bare_objective(session)
        step = Step(session.vlm, optimizers, feed, count, objective, None, ["data"])
        text = session.shapes.text
        routed = settings.data.seq_length * text.moe.top_k if text.moe is not None else 0
        before, token_dispatcher.maybe_move_tensor_to_cpu = token_dispatcher.maybe_move_tensor_to_cpu, _to_host
        count_rows = step._count  # only the leader has rows to count, and no sum reaches another rank
        step._count = lambda rows, *, failed=False: count_rows(rows, failed=failed) | {"weight": 8.0}
        with Watch(routed):  # some things are made only once
            step()
        with Watch(routed) as watch:
            step()
        token_dispatcher.maybe_move_tensor_to_cpu = before
        language, groups = session.groups.language, {}
        for name in ("tp", "cp", "pp", "dp", "mp", "embd", "tp_cp", "dp_cp", "ep", "tp_ep_pp", "expt_dp"):
            group = getattr(language, name, None)
            if group is not None:
                groups.setdefault(tuple(torch.distributed.get_process_group_ranks(group)), name.upper())
        groups[tuple(torch.distributed.get_process_group_ranks(session.groups.model_parallel))] = "model-parallel"
        groups[tuple(range(world_size))] = "world"
        return watch.waits, [(n, on, groups.get(ranks, str(ranks)), b) for n, on, ranks, b in watch.collectives]
