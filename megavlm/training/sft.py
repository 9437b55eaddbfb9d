"""`megavlm sft`: supervised tuning on conversations; only what the assistant says is learned."""

from megavlm.config.settings import Settings
from megavlm.training.loop import LanguageModeling, train


def method(settings: Settings) -> LanguageModeling:
    return LanguageModeling("tune", "supervised tuning")


def main(settings: Settings) -> int:
    return train(settings, method(settings))
