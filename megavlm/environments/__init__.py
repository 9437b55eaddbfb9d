"""Environments of the user's own, with which the model speaks in several turns; see docs/environments.md."""

from megavlm.environments.step import Step

__all__ = ["Step"]
