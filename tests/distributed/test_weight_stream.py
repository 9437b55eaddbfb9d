"""The weights that a stream brings to rank 0 have the bits of an export of the same weights, from every layout.

The folders hold float32. Each rank multiplies its weights by 1.5 after they are loaded, so what arrives is expected to
be the folder's tensors times 1.5: a product of two numbers is rounded alike in every layout.
"""

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from adapted import ADAPTERS, peft_model, save_adapter
from parity import part_of, save_weights, settings_of
from pool import RankError
from safetensors.torch import load_file, save_file

FACTOR, LIMIT = 1.5, 200_000  # bytes of a bucket: the toys have 6 to 9 MB


class Peak(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the bytes of all tensors that operations have made within the block and that still exist."""

    def __init__(self, existing):
        super().__init__()
        self.existing = {tensor.untyped_storage().data_ptr() for tensor in existing}
        self.alive, self.most = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        from torch.multiprocessing.reductions import StorageWeakRef

        made = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.existing:
                storage = tensor.untyped_storage()
                self.alive[StorageWeakRef(storage).cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {key: (ref, size) for key, (ref, size) in self.alive.items() if not ref.expired()}
        self.most = max(self.most, sum(size for _, size in self.alive.values()))
        return made


def changed_session(settings: dict):
    """A session whose weights are ``FACTOR`` times those that it loads, and its parameters."""
    from megavlm.config.settings import Settings
    from megavlm.model.vlm import PARTS
    from megavlm.runtime.session import start

    session = start(Settings(**settings), training=True)
    modules = [module for part in PARTS for module in session.vlm.modules_of(part)]
    parameters = [parameter for module in modules for parameter in module.parameters()]
    for parameter in parameters:
        parameter.data.mul_(FACTOR)
    return session, parameters


@dataclass
class Arrived:
    """The tensors by name and their dtypes, the bytes of each bucket, and the most bytes that were held meanwhile."""

    tensors: dict
    dtypes: set
    sizes: list
    most: int


def stream(settings: dict, ways: list, save: Path | None = None) -> list[Arrived]:
    """Runs on every rank: a stream for each of the ``ways``, which are options of ``buckets``, or "adapters".

    The weights are saved to ``save``/base and ``save``/adapter.
    """
    from megavlm.convert import SHARDED_METADATA
    from megavlm.runtime.weight_stream import WeightStream

    session, parameters = changed_session(settings)
    if save is not None:
        shards = session.vlm.sharded_state_dict(dict(SHARDED_METADATA))
        base = {name: entry for name, entry in shards.items() if not entry.key.startswith("adapter.")}
        save_weights(base, save / "base", session.groups)
        if session.adapters is not None:
            save_adapter(session, save / "adapter")
    weights, arrived = WeightStream(session), []
    for way in ways:
        found, dtypes, sizes, peak = {}, set(), [], Peak(parameters)
        with peak:
            for bucket in weights.adapter_buckets(LIMIT) if way == "adapters" else weights.buckets(LIMIT, **way):
                sizes.append(sum(tensor.nbytes for _, tensor in bucket))
                dtypes |= {str(tensor.dtype) for _, tensor in bucket}
                assert not found.keys() & dict(bucket).keys()
                # numpy's memory is not counted
                found |= {name: tensor.float().numpy().copy() for name, tensor in bucket}
                del bucket
        tensors = {name: torch.from_numpy(values) for name, values in found.items()}
        arrived.append(Arrived(tensors, dtypes, sizes, peak.most))
    return arrived


def streamed(request, settings: dict, *ways: dict | str, save: Path | None = None) -> list[Arrived]:
    """What rank 0 got, after a check that the other ranks got as many buckets and nothing in them."""
    parallel = settings["parallel"]
    size = math.prod(parallel.get(name, 1) for name in ("tensor", "pipeline", "context", "data"))
    size = max(size, math.prod(parallel.get(name, 1) for name in ("expert", "expert_tensor", "pipeline")))
    settings = settings | {"parallel": {name: value for name, value in parallel.items() if name != "data"}}
    world = request.getfixturevalue(f"world{size}")
    first, *others = world.run(stream, settings, list(ways) or [{}], save)
    for other in others:
        assert [found.tensors for found in other] == [{}] * len(first)
        assert [found.sizes for found in other] == [[0] * len(found.sizes) for found in first]
    return first


def check_equal(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name].float())] == []


# Kind of the model, layout ("data" counts further ranks), precision.
CASES = {
    "one process": ("dense-other-output", {}, "fp32"),
    "TP2": ("dense", {"tensor": 2}, "bf16"),
    "PP2": ("dense", {"pipeline": 2}, "fp32"),
    "PP2 × VPP2": ("dense-untied", {"pipeline": 2, "virtual_pipeline": 2}, "fp32"),
    "CP2": ("dense", {"context": 2}, "fp32"),
    "TP2 × PP2": ("dense-untied", {"tensor": 2, "pipeline": 2}, "fp32"),
    "TP2 × DP2": ("dense", {"tensor": 2, "data": 2}, "fp32"),
    "MoE EP2": ("moe", {"expert": 2}, "fp32"),
    "MoE ETP2 × TP2": ("moe-tied", {"tensor": 2, "expert_tensor": 2}, "bf16"),
    "MoE EP2 × PP2": ("moe", {"pipeline": 2, "expert": 2}, "fp32"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_arrives_has_the_bits_of_the_weights(case, toys, request):
    kind, parallel, precision = CASES[case]
    settings = settings_of(toys.folder(kind), parallel, precision=precision)
    settings["model"]["load"] = str(toys.folder(kind))
    (found,) = streamed(request, settings)
    rounded = lambda tensor: (tensor.to(torch.bfloat16 if precision == "bf16" else torch.float32) * FACTOR).float()
    weights = load_file(toys.folder(kind) / "model.safetensors")
    check_equal(found.tensors, {name: rounded(tensor) for name, tensor in weights.items()})
    assert found.dtypes == {"torch.float32"}, "that of the folder"
    # the tensors of a bucket, and either the message of a rank, which has all of them where it is a stage, or a cast
    assert max(found.sizes) > LIMIT / 2
    assert found.most <= 2 * max(found.sizes) < sum(found.sizes) / 2


def exported(checkpoint: Path, folder: Path, out: Path, **options) -> dict:
    from megavlm.convert import mcore_to_hf

    mcore_to_hf(checkpoint, folder, out, progress=False, **options)
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_added_tokens_and_the_dtype_are_those_of_an_export(dtype, toys, tmp_path, request):
    """Experts too are in the folder's order of axes: one folder has them transposed, as released ones do."""
    folder = shutil.copytree(toys.folder("moe"), tmp_path / "hf")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.setdefault("added_tokens_decoder", {})["551"] = {"content": "<|new|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    turn = lambda name, x: x.transpose(-1, -2).contiguous() if dtype == torch.bfloat16 and "mlp.experts." in name else x
    weights = load_file(folder / "model.safetensors")
    save_file({name: turn(name, x).to(dtype) for name, x in weights.items()}, folder / "model.safetensors")
    settings = settings_of(folder, {"tensor": 2})
    settings["model"] |= {"load": str(folder), "resize_vocabulary": True}
    (found,) = streamed(request, settings, save=tmp_path)
    expected = exported(tmp_path / "base", folder, tmp_path / "out", resize_vocabulary=True)
    check_equal(found.tensors, expected)
    assert found.tensors["lm_head.weight"].shape[0] > weights["lm_head.weight"].shape[0]
    assert found.dtypes == {str(dtype)}


@pytest.mark.parametrize(
    ("name", "parallel"),
    [
        ("lora", {"tensor": 2, "pipeline": 2}),
        ("dora", {"tensor": 2}),
        ("fourierft", {"pipeline": 2}),
        ("lora on experts", {"expert": 2}),
        ("lora on experts", {"tensor": 2, "expert_tensor": 2}),
    ],
)
def test_adapters_are_sent_by_themselves_or_merged(name, parallel, toys, tmp_path, request):
    from megavlm.convert.adapter import ADAPTER_MODEL, Adapter
    from megavlm.model.shapes import Shapes

    kind, options = ADAPTERS[name]
    folder = toys.folder(kind)
    peft_model(folder, options).save_pretrained(tmp_path / "peft")
    settings = settings_of(folder, parallel)
    settings["model"] |= {"load": str(folder), "adapter": str(tmp_path / "peft")}
    ways = "adapters", {"merged": True}, {"only_trained": True}
    alone, merged, trained = [found.tensors for found in streamed(request, settings, *ways, save=tmp_path)]
    check_equal(alone, {key: x * FACTOR for key, x in load_file(tmp_path / "peft" / ADAPTER_MODEL).items()})
    adapter = Adapter(tmp_path / "adapter", Shapes.from_hf(folder))
    expected = exported(tmp_path / "base", folder, tmp_path / "merged", adapter=adapter)
    check_equal(merged, expected)
    plain = load_file(folder / "model.safetensors")
    changed = {key.removesuffix(".weight") for key, x in expected.items() if not torch.equal(x, plain[key] * FACTOR)}
    assert changed == adapter.linears.keys()

    parts = {part_of(linear) for linear in adapter.linears}
    check_equal(trained, {key: x * FACTOR for key, x in plain.items() if part_of(key) not in parts})


def test_frozen_parts_need_not_be_sent(toys, request):
    settings = settings_of(toys.folder("dense"), {"pipeline": 2}, freeze=("vision", "language"))
    settings["model"]["load"] = str(toys.folder("dense"))
    (found,) = streamed(request, settings, {"only_trained": True})
    plain = load_file(toys.folder("dense") / "model.safetensors")
    check_equal(found.tensors, {key: x * FACTOR for key, x in plain.items() if part_of(key) == "projector"})


def stop_early(settings: dict) -> int:
    """Runs on every rank: rank 0 closes the stream after the first bucket; then all ranks stream once more."""
    from contextlib import closing

    from megavlm.runtime.weight_stream import WeightStream

    session, _ = changed_session(settings)
    with closing(WeightStream(session).buckets(LIMIT)) as buckets:
        for _ in buckets:
            if session.is_first:
                break
    return sum(len(bucket) for bucket in WeightStream(session).buckets(LIMIT))


def test_a_stream_that_rank_0_closes_leaves_no_rank_waiting(toys, world2):
    settings = settings_of(toys.folder("dense"), {"pipeline": 2})
    settings["model"]["load"] = str(toys.folder("dense"))
    assert world2.run(stop_early, settings) == [len(load_file(toys.folder("dense") / "model.safetensors")), 0]


def test_weights_in_4_bits_are_refused(toys, world1):
    settings = settings_of(toys.folder("dense"), {}, freeze=("vision", "projector"))
    settings["model"]["load"] = str(toys.folder("dense"))
    settings["adapter"] = {"type": "lora", "rank": 4, "quantize": "nf4"}
    with pytest.raises(RankError, match="stored in 4 bits"):
        world1.run(stream, settings, [{}])
    assert world1.run(stream, settings, ["adapters"])[0][0].tensors
