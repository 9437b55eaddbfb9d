"""Commands that a message names can be typed as they stand: they have the configuration of the running command."""

import shlex

import pytest

from megavlm.base import command_line
from megavlm.base.command_line import command, given, remember


@pytest.fixture(autouse=True)
def as_before():
    known = list(command_line._given)
    command_line._given[:] = ["CONFIG.yaml"]  # another test may have run a command in this process
    yield
    command_line._given[:] = known


def test_a_command_has_the_configuration_and_the_overrides():
    assert command("data inspect") == "megavlm data inspect CONFIG.yaml"  # before any was given
    remember("my runs/sft.yaml", ["data.train=a b.jsonl", "train.groups=[{match: '.'}]"])
    typed = command("data inspect", "--samples", "50")
    assert shlex.split(typed) == [
        *("megavlm", "data", "inspect", "my runs/sft.yaml", "data.train=a b.jsonl", "train.groups=[{match: '.'}]"),
        *("--samples", "50"),
    ]
    assert given() == ("my runs/sft.yaml", ["data.train=a b.jsonl", "train.groups=[{match: '.'}]"])
