"""The weights of a model as they are now, sent to rank 0 in buckets and under Hugging Face's names.

An inference server is given its new weights from there. Each rank sends the pieces that no other rank sends, those of a
bucket as one message, and rank 0 copies them to their places in tensors of Hugging Face's shape. So no rank ever has
more than its own weights, the tensors of one bucket and the message of one rank.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories, is_main_replica
from torch import Tensor

from megavlm.adapters.attach import learned
from megavlm.base.errors import UserError
from megavlm.base.heartbeat import beat
from megavlm.checkpoint.folders import find_checkpoint
from megavlm.checkpoint.manager import MAIN
from megavlm.convert import SHARDED_METADATA, hf_layout
from megavlm.convert.hf_folder import HfLayout
from megavlm.convert.hf_source import check_names
from megavlm.convert.names import HF_EMBEDDING, HF_OUTPUT, Entry, table
from megavlm.convert.peft_names import Linear, peft_name, targeted, tensor_shapes
from megavlm.convert.safetensors_file import DTYPES
from megavlm.convert.tensor_order import Shape, views_of_box
from megavlm.platform import device, synchronize
from megavlm.platform.collectives import all_gather_objects, gather_objects, on_first_rank
from megavlm.runtime.session import Session
from megavlm.runtime.weight_items import AdapterItem, Item, Named, WeightItem


@dataclass(frozen=True)
class _Box:
    """A piece of a tensor of a checkpoint, which one rank sends."""

    key: str
    offset: Shape
    shape: Shape
    dtype: torch.dtype


class WeightStream:
    """Sends the weights of a model to rank 0, from any layout. It keeps nothing between two calls.

    Names, shapes, dtypes, copies and the order of numbers are those of ``megavlm export``: those of the weights in
    ``model.hf``, else those recorded where the run started.

    Args:
        session: the session; create the stream on all ranks.
        name: the name of the model in ``session.models``.
        in_run_dtype: whether tensors have the dtype of the run instead, so that a server computes with what is trained.

    Raises:
        UserError: the files of ``model.hf`` are damaged or of another model.
    """

    def __init__(self, session: Session, name: str = MAIN, *, in_run_dtype: bool = False) -> None:
        self._session, self._name = session, name
        tensors = on_first_rank(self._layout, session.groups.world_host).tensors
        if in_run_dtype:
            dtype = session.models[name].vlm.decoder_config.params_dtype
            spelled = next(key for key, value in DTYPES.items() if value == dtype)
            tensors = {key: replace(info, dtype=spelled) for key, info in tensors.items()}
        self._tensors = tensors

    def buckets(self, max_bytes: int, *, merged: bool = False, only_trained: bool = False) -> Iterator[Named]:
        """The weights. Iterate on all ranks: rank 0 gets the tensors, the others an empty list for each bucket.

        If rank 0 stops early, it must call ``close()`` of the iterator (``contextlib.closing`` does), which receives
        what the others still send; otherwise they would wait.

        Args:
            max_bytes: the largest size of a bucket. What is one tensor in a checkpoint is never cut, so a bucket is
                larger where one such tensor is: the word embedding, or a matrix of all experts of a layer.
            merged: whether to merge the model's adapters into the weights, as an export does.
            only_trained: whether to leave out what is frozen now, and has no adapter that is merged.

        Yields:
            Pairs of a name and a tensor, contiguous and on the rank's device. Copies of a tied weight are the same
            tensor.

        Raises:
            UserError: the decoder's weights are stored in 4 bits; not if they are left out (``only_trained``).
        """
        adapters = self._session.models[self._name].adapters
        shards = self._shards()
        if adapters is not None and adapters.settings.quantize and (merged or not only_trained):
            raise UserError(
                f"adapter.quantize is {adapters.settings.quantize}: the decoder's weights are stored in 4 bits and "
                "cannot be sent",
                "send the adapters by themselves, or set adapter.quantize to null",
            )
        linears = self._adapted if merged else {}
        entries = table(self._session.shapes)
        if only_trained:
            own = {entry.key for entry in learned(shards).values()}
            trained = set().union(*all_gather_objects(own, self._session.groups.world_host))
            entries = [entry for entry in entries if entry.key in trained or self._linears_of(entry, linears)]
        settings = adapters.settings if adapters is not None else None
        items = [WeightItem(entry, self._tensors, settings, self._linears_of(entry, linears)) for entry in entries]
        return self._stream(items, max_bytes, shards)

    def adapter_buckets(self, max_bytes: int) -> Iterator[Named]:
        """The adapters under the names and in the shapes of peft's file; otherwise as ``buckets``."""
        adapters = self._session.models[self._name].adapters
        assert adapters is not None, f"the model {self._name} has no adapters"
        dtype = self._session.models[self._name].vlm.decoder_config.params_dtype
        items = [
            AdapterItem(self._peft_names[name, kind], linear, kind, shape, dtype)
            for name, linear in self._adapted.items()
            for kind, shape in tensor_shapes(adapters.settings, linear).items()
        ]
        return self._stream(items, max_bytes, self._shards())

    def _layout(self) -> HfLayout:
        """The tensors of an export."""
        model, shapes = self._session.settings.model, self._session.shapes
        entries = table(shapes)
        layout = hf_layout(model.hf, find_checkpoint(model.start) if model.start is not None else None)
        if layout is None:
            dtype = self._session.models[self._name].vlm.decoder_config.params_dtype
            layout = HfLayout.sharded({name: shape for entry in entries for name, shape in entry.hf.items()}, dtype)
        layout = layout.with_rows((HF_EMBEDDING, HF_OUTPUT), shapes.text.vocab)
        check_names(entries, layout, model.hf)
        return layout

    @cached_property
    def _adapted(self) -> dict[str, Linear]:
        """The linear layers with adapters, by name."""
        adapters = self._session.models[self._name].adapters
        return targeted(adapters.settings, self._session.shapes) if adapters is not None else {}

    @cached_property
    def _peft_names(self) -> dict[tuple[str, str], str]:
        adapters = self._session.models[self._name].adapters
        assert adapters is not None
        return {
            (name, kind): peft_name(adapters.settings, self._session.shapes, linear, kind)
            for name, linear in self._adapted.items()
            for kind in tensor_shapes(adapters.settings, linear)
        }

    @staticmethod
    def _linears_of(entry: Entry, linears: dict[str, Linear]) -> dict[str, Linear]:
        names = [name.removesuffix(".weight") for name in entry.hf]
        return {name: linears[name] for name in names if name in linears}

    def _shards(self) -> dict:
        return self._session.models[self._name].vlm.sharded_state_dict(dict(SHARDED_METADATA))

    def _stream(self, items: Sequence[Item], max_bytes: int, shards: dict) -> Iterator[Named]:
        """Sends items, in buckets of ``max_bytes``."""
        wanted = {key for item in items for key in item.keys}
        mine = [(box, values) for box, values in _boxes(shards) if box.key in wanted]
        everywhere = gather_objects([box for box, _ in mine], self._session.groups.world_host)
        buckets = _buckets(items, max_bytes)
        return _receive(buckets, everywhere, mine) if self._session.is_first else _send(buckets, mine)


def _boxes(shards: dict) -> Iterator[tuple[_Box, Tensor]]:
    """The pieces of which this rank has the first copy, as views of its parameters."""
    apply_factories(shards)  # the rank's parts of gate and up are two boxes of a tensor
    for shard in nested_values(shards):
        if isinstance(shard, ShardedTensor) and is_main_replica(shard.replica_id):
            assert shard.data is not None, shard.key
            shape = (1,) * shard.prepend_axis_num + tuple(shard.local_shape)  # an expert is a box of the stacked ones
            yield _Box(shard.key, tuple(shard.global_offset), shape, shard.dtype), shard.data.detach()


def _buckets(items: Sequence[Item], max_bytes: int) -> list[list[Item]]:
    """The items in buckets, in their order. All ranks get the same ones."""
    found: list[list[Item]] = []
    size = 0
    for item in items:
        if not found or size + item.nbytes > max_bytes:
            found.append([])
            size = 0
        found[-1].append(item)
        size += item.nbytes
    return found


def _messages(boxes: list[_Box], bucket: list[Item]) -> Iterator[list[int]]:
    """Which of a rank's boxes it sends together for a bucket: those of one dtype."""
    keys = {key for item in bucket for key in item.keys}
    numbers = [number for number, box in enumerate(boxes) if box.key in keys]
    dtype = lambda number: str(boxes[number].dtype)
    yield from (list(group) for _, group in groupby(sorted(numbers, key=dtype), key=dtype))


def _send(buckets: list[list[Item]], mine: list[tuple[_Box, Tensor]]) -> Iterator[Named]:
    boxes = [box for box, _ in mine]
    for bucket in buckets:
        for numbers in _messages(boxes, bucket):
            _pass_on(dist.isend, torch.cat([mine[number][1].reshape(-1) for number in numbers]), 0)
        synchronize()  # or a GPU's memory would fill with messages that rank 0 has yet to take
        beat("sending weights")
        yield []


def _receive(
    buckets: list[list[Item]], everywhere: list[list[_Box]], mine: list[tuple[_Box, Tensor]]
) -> Iterator[Named]:
    """``everywhere``: for each rank its boxes."""
    for place, bucket in enumerate(buckets):
        _fill(bucket, everywhere, mine)
        beat("receiving weights")
        try:
            yield [pair for item in bucket for pair in item.end()]
        except GeneratorExit:
            for rest in buckets[place + 1 :]:
                for source, boxes in enumerate(everywhere[1:], 1):
                    for numbers in _messages(boxes, rest):
                        _arrived(boxes, numbers, source)
            raise


def _fill(bucket: list[Item], everywhere: list[list[_Box]], mine: list[tuple[_Box, Tensor]]) -> None:
    """Puts the boxes of all ranks in their places."""
    dtypes = {box.key: box.dtype for boxes in everywhere for box in boxes}
    blocks = {key: found for item in bucket for key, found in item.begin(dtypes).items()}
    missing = {key: sum(block.numel() for block in found) for key, found in blocks.items()}
    for source, boxes in enumerate(everywhere):
        for numbers in _messages(boxes, bucket):
            values = [mine[number][1] for number in numbers] if source == 0 else _arrived(boxes, numbers, source)
            for box, value in zip([boxes[number] for number in numbers], values, strict=True):
                for rows, view in views_of_box(blocks[box.key], box.offset, box.shape):
                    view.copy_(value.reshape(box.shape)[rows])
                    missing[box.key] -= view.numel()
    assert not any(missing.values()), f"no rank has all of {[key for key in missing if missing[key]]}"


def _arrived(boxes: list[_Box], numbers: list[int], source: int) -> list[Tensor]:
    """The next message of a rank: the numbers in each of its boxes, flat."""
    sizes = [torch.Size(boxes[number].shape).numel() for number in numbers]
    message = torch.empty(sum(sizes), dtype=boxes[numbers[0]].dtype, device=device())
    _pass_on(dist.irecv, message, source)
    return list(message.split(sizes))


def _pass_on(way: Callable, message: Tensor, other: int) -> None:
    """Sends or receives. As a batch of one, NCCL uses the communicator of all ranks, instead of a new one per pair."""
    for work in dist.batch_isend_irecv([dist.P2POp(way, message, other)]):
        work.wait()
