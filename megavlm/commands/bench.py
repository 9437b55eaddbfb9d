"""`megavlm bench`: steps of a configuration on this machine, as one line of JSON. It writes no files."""

import json

import torch.distributed as dist

from megavlm.align.registry import METHODS
from megavlm.commands.plan import verb_of
from megavlm.config.settings import Settings
from megavlm.convert.hf_shapes import model_shapes
from megavlm.plan.bench import at_full_size, check, leave, measure
from megavlm.plan.bench_report import planned_memory, report
from megavlm.plan.mix import Mix


def main(
    settings: Settings,
    steps: int = 10,
    warmup: int = 3,
    verb: str | None = None,
    synthetic: bool = False,
    samples: int = 1,
    pictures: int | None = None,
) -> int:
    """Measures steps, and prints on rank 0 what they took and what memory is planned for them.

    Args:
        settings: the settings of the configuration.
        steps, warmup: number of measured steps, and of steps before them.
        verb: the verb for which the configuration is intended; default: a guess from the settings.
        synthetic: take random weights and synthetic rows instead of ``model.load`` and ``data.train``.
        samples, pictures: what each synthetic row contains (``megavlm.plan.mix.Mix.of``).

    Raises:
        UserError: the settings do not fit the model, the verb or the processes, or the data cannot be read.
    """
    verb, synthetic_rows = verb or verb_of(settings), synthetic or not settings.data.train
    check(settings, verb, synthetic=synthetic_rows)
    full, mix = at_full_size(settings, synthetic=synthetic), None
    if synthetic_rows:
        answers = 2 if METHODS[verb].kind in ("pair", "judged") else 1
        shapes = model_shapes(full.model)
        mix = Mix.of(full, shapes, samples=samples, pictures=pictures, answers=answers)
    found = measure(full, verb, mix, steps, warmup)
    session, world_size = found.session, dist.get_world_size()
    line = report(settings, verb, found)
    line |= {"rows": str(mix) if mix is not None else "data.train", "weights": str(full.model.start or "random")}
    is_first = session.is_first
    leave(session)
    if is_first:
        if found.rows:
            line["memory"]["planned"] = planned_memory(session.settings, verb, world_size, found.rows)
        print(json.dumps(line))
    return 0
