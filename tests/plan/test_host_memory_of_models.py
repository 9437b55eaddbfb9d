"""Host memory of a stage with several models, as in ppo."""

from megavlm.plan.stage import Stage
from megavlm.plan.stage_memory import ChunkMemory, StageMemory
from megavlm.plan.stage_operators import StageOperators
from megavlm.plan.step_memory import Peak
from megavlm.tracing.static_memory import StaticMemory


def test_each_model_has_its_own() -> None:
    """On the first of two stages two rows are between their passes at a time, of each model."""
    nothing = Peak("", {})
    models = [StageMemory(nothing, {}, [ChunkMemory(nothing, {}, nothing, {}, on_host=10**n)], nothing) for n in (2, 4)]
    static = [StaticMemory(on_host=1), StaticMemory(on_host=2)]
    stage = Stage(static, False, models, 0, 0, 0, 0, StageOperators({}, 1), 8, ())
    assert stage.on_host(0, 2) == 3 + 2 * 10100
    assert stage.on_host(1, 2) == 3 + 10100


def test_chunks_of_a_stage() -> None:
    """Each keeps its last layer's input on the device, however many layers it has, and shares the host memory."""
    peak = Peak("decoder", {"decoder": 30})
    whole = ChunkMemory(peak, {"decoder": 10}, peak, {}, layers=4, on_host=400)
    half = whole.part(2)
    assert (half.kept, half.forward, half.on_host) == ({"decoder": 10}, peak, 200)
    memory = StageMemory(Peak("", {}), {}, [whole], Peak("", {}))
    assert memory.interleaved(2).on_host(0, 1, 2) == memory.on_host(0, 1, 2) == 400
