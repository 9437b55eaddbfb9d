"""The planned size of a checkpoint beside that of one that ranks have written."""

import pytest
from parity import settings_of
from test_checkpoint import run
from test_dry_run import alone
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

BF16 = {"precision": "bf16", "optimizer": "adam"}
LAYOUTS = {
    "MoE EP2": (2, "moe", {"expert": 2}, {}),
    "TP2": (2, "dense-untied", {"tensor": 2}, {"offload_optimizer": True, "adam_moments": "bf16"}),
}


def planned(folder, settings, world: int) -> int:
    from megavlm.config.settings import Settings
    from megavlm.model.shapes import Shapes
    from megavlm.plan.gpus import gpu_of
    from megavlm.plan.mix import Mix
    from megavlm.plan.plan import make_plan

    settings, shapes = Settings(**settings), Shapes.from_hf(folder)
    with alone():
        mix = Mix.of(settings, shapes, pictures=0)
        return make_plan(settings, shapes, "sft", world, gpu_of("h100"), mix=mix).checkpoint.size


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_is_as_large_as_was_planned(layout, toys, tmp_path, request, world1) -> None:
    size, kind, parallel, options = LAYOUTS[layout]
    folder = toys.folder(kind)
    settings = settings_of(folder, parallel, **BF16, **options, moe=kind == "moe")
    settings["train"]["steps"] = 1
    arguments = folder, toys.checkpoint(kind), toys.root, toys.records, settings, tmp_path
    request.getfixturevalue(f"world{size}").run(run, *arguments, steps=1, save_at=(1,))
    (metadata,) = (FileSystemReader(file.parent).read_metadata() for file in tmp_path.rglob(".metadata"))
    tensors = [one for one in metadata.state_dict_metadata.values() if isinstance(one, TensorStorageMetadata)]
    written = sum(one.size.numel() * one.properties.dtype.itemsize for one in tensors)
    (expected,) = world1.run(planned, folder, settings, size)
    # Padding of Megatron's buffers is planned and not written; numbers of steps are written and not planned.
    assert written == pytest.approx(expected, rel=0.002), (written, expected)
