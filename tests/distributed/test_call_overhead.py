"""The overhead of a call in ``bench --operators``: what a tiny model's step takes beyond its operators."""

import pytest
from test_dry_run import alone


def overhead(of_an_operator: float | None, of_a_step: float | None) -> tuple[float, float]:
    """Runs on a rank: the overhead, if all operators and a step take so long (None: a real step), and the calls."""
    from megavlm.bench import call_overhead

    with alone(), pytest.MonkeyPatch.context() as patch:
        recorded = call_overhead.record_tiny_step()
        known = [] if of_an_operator is None else [(call, of_an_operator) for call in recorded[1]]
        patch.setattr(call_overhead, "measure_operators", lambda examples, where: known)
        if of_a_step is not None:
            patch.setattr(call_overhead, "_seconds_of_a_step", lambda: of_a_step)
        operators, _ = recorded
        return call_overhead.call_overhead(recorded), sum(operators.of_step(2, 1).values())


def test_what_the_operators_do_not_explain_is_spread_over_their_calls(world1) -> None:
    ((found, calls),) = world1.run(overhead, 1e-4, 1.0)
    assert calls > 1000  # forward, backward and update of four layers and a tower
    assert found == pytest.approx(1 / calls - 1e-4, rel=0.02)  # collectives of one rank have no example
    ((found, _),) = world1.run(overhead, 1.0, 1.0)
    assert found == 0  # not less, if a busy machine was faster in the step


def test_a_step_of_the_tiny_model_runs(world1) -> None:
    ((found, _),) = world1.run(overhead, None, None)
    assert 0 < found < 0.1


def test_a_file_of_measurements_has_it() -> None:
    from megavlm.bench.measured_gpu import _gpu

    assert _gpu({}, 0.125, 1).operators["overhead"] == 0.125
