"""`megavlm sft`: supervised tuning on conversations; only what the assistant says is learned."""

from megavlm.config.settings import Settings
from megavlm.training.loop import Likelihood, train


def method(settings: Settings) -> Likelihood:
    return Likelihood("tune", "supervised tuning")


def main(settings: Settings) -> int:
    return train(settings, method(settings))
