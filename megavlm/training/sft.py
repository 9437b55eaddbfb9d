"""`megavlm sft`: supervised tuning on conversations; only what the assistant says is learned."""

from megavlm.config.settings import Settings
from megavlm.training.loop import train


def main(settings: Settings) -> int:
    return train(settings, "tune", "supervised tuning")
