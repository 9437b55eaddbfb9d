"""`megavlm sft`: supervised tuning on conversations; only what the assistant says is learned."""

from megavlm.config.settings import Settings
from megavlm.training.loop import Likelihood, train


def main(settings: Settings) -> int:
    return train(settings, Likelihood("tune", "supervised tuning"))
