"""Costs: shares of a GPU's peaks, collectives over fast and slow links, and measurements of the nearest size."""

import pytest

from megavlm.base.errors import UserError
from megavlm.plan.costs import Assumed, Measured, collective_seconds, costs_of, on_wire
from megavlm.plan.gpus import gpu_of, gpus, write_gpu
from megavlm.tracing.operators import Call

GPU = gpu_of("h100")
SHARES = GPU.operators


def product(m: int, k: int, n: int, dtype: str = "bfloat16") -> Call:
    return Call("product", "mm", (1, m, k, n), dtype, 2 * m * k * n, 2 * (m * k + k * n + m * n))


def sent(name: str, ranks: range, moved: int) -> Call:
    return Call("collective", name, tuple(ranks), "bfloat16", 0, moved, "data")


def test_a_large_product_takes_its_share_of_the_peak_and_a_thin_one_that_of_memory() -> None:
    costs, large, thin = Assumed(GPU), product(8192, 8192, 8192), product(1, 8192, 8192)
    assert costs.seconds(large) == pytest.approx(2 * 8192**3 / (989.4e12 * SHARES["product"]) + SHARES["overhead"])
    assert costs.seconds(thin) == pytest.approx(thin.moved / (3350e9 * SHARES["memory"]) + SHARES["overhead"])
    assert costs.seconds(large, fp8=True) < 0.7 * costs.seconds(large)
    assert Assumed(gpu_of("a100")).seconds(large, fp8=True) == Assumed(gpu_of("a100")).seconds(large)  # it has no FP8
    assert costs.seconds(product(8192, 8192, 8192, "float32")) > 10 * costs.seconds(large)


def test_state_in_host_memory_is_copied_at_the_rate_of_the_bus() -> None:
    copied = Call("host", "copy", (), "float32", 0, 12 * 10**9)
    assert Assumed(GPU).seconds(copied) == pytest.approx(12 / (64 * SHARES["host"]))
    assert Assumed(gpu_of("a100")).seconds(copied) == pytest.approx(12 / (32 * SHARES["host"]))


def test_every_gpu_says_what_is_needed() -> None:
    for gpu in gpus().values():
        assert gpu.memory_gib > 0
        assert Assumed(gpu).seconds(product(64, 64, 64)) > 0
        assert gpu.fp8_tflops is None or gpu.fp8_tflops > gpu.bf16_tflops


def test_rings_send_what_nccl_sends() -> None:
    assert on_wire(sent("all_reduce", range(8), 800)) == 1400
    assert on_wire(sent("all_gather", range(8), 100)) == 700  # the parts of the seven others
    assert on_wire(sent("reduce_scatter", range(8), 800)) == 700
    assert on_wire(sent("send", range(2), 800)) == 800


def test_a_group_beyond_a_node_takes_the_network() -> None:
    inside, outside = 450e9 * SHARES["nvlink"], 50e9 * SHARES["fabric"]
    size = 2**30
    within = collective_seconds(sent("reduce_scatter", range(8), size), GPU)
    assert within == pytest.approx(SHARES["latency"] + 7 / 8 * size / inside)
    # sixteen GPUs of two nodes: eight rings, each over a network card
    both = collective_seconds(sent("reduce_scatter", range(16), size), GPU)
    assert both == pytest.approx(SHARES["latency_between"] + 15 / 16 * size / min(inside, 8 * outside))
    # the same GPU of two nodes: one card
    apart = collective_seconds(sent("reduce_scatter", range(0, 16, 8), size), GPU)
    assert apart == pytest.approx(SHARES["latency_between"] + size / 2 / outside)
    # of an all-to-all, half goes to the other node
    shuffled = collective_seconds(sent("all_to_all", range(16), size), GPU)
    assert shuffled == pytest.approx(SHARES["latency_between"] + size / 2 / outside)


def test_the_nearest_measurement_is_scaled() -> None:
    small, large = product(64, 64, 64, "float32"), product(1024, 1024, 1024, "float32")
    add = Call("elementwise", "add", (), "float32", 0, 4000)
    costs = Measured([(small, 1.0), (large, 100.0), (add, 2.0)], 0.5, Assumed(GPU))
    assert costs.seconds(large) == 100.5
    assert costs.seconds(product(2048, 1024, 1024, "float32")) == 200.5  # twice the operations
    assert costs.seconds(add._replace(moved=8000)) == 4.5
    assert costs.seconds(add._replace(moved=10)) == 2.5  # no less than the smallest that was measured
    other = add._replace(name="mul")
    assert costs.seconds(other) == 0.5 + Assumed(GPU).seconds(other)


def test_a_file_of_measurements_is_a_gpu(tmp_path) -> None:
    import dataclasses

    call = product(64, 64, 64)
    points = [[*call[:2], list(call.sizes), *call[3:6], 7.0]]
    file = tmp_path / "mine.yaml"
    write_gpu(file, dataclasses.replace(GPU, name="mine", operators={"overhead": 1.0, "points": points}))
    gpu = gpu_of(str(file))
    assert gpu.name == "mine"
    assert costs_of(gpu).seconds(call) == 8.0
    file.write_text("name: half\n")
    for wrong in (file, tmp_path / "none.yaml"):
        with pytest.raises(UserError, match="cannot be read as a file of measurements"):
            gpu_of(str(wrong))
    with pytest.raises(UserError, match="known are h100"):
        gpu_of("h1000")
