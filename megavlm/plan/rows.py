"""How many rows a step has on a rank: given by the settings, or assumed of methods that sample their own answers."""

from megavlm.align.registry import METHODS
from megavlm.align.sampling_checks import with_group_size
from megavlm.config.settings import Settings
from megavlm.plan.mix import Contents


def rows_of_rank(settings: Settings, verb: str, mix: Contents, data_parallel: int) -> int:
    """The number of rows of a step on each data-parallel rank; of grpo and ppo, of an update.

    Their answers do not exist yet. An update has the answers to its prompts, of which a row has as many as the mix
    says: so layouts with other numbers of ranks are compared by the same answers.
    """
    own = with_group_size(settings, verb)
    prompts, size = own.rollout.prompts, own.rollout.group_size
    if not METHODS[verb].samples or prompts is None or size is None:
        return settings.rows_per_step(data_parallel)
    answers = -(-prompts * size // own.align.mini_batches)
    rows = -(-answers // (mix.segments * data_parallel))
    stages = own.parallel.pipeline if own.parallel.virtual_pipeline else 1  # interleaving needs a multiple of them
    return -(-rows // stages) * stages
