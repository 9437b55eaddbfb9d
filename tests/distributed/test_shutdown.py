"""What a model's process groups leave behind in the process that had them."""

from parity import settings_of


def groups_left(settings: dict) -> list[str]:
    """Runs on every rank: the process groups that Megatron still has after the end of a session."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from megavlm.config.settings import Settings
    from megavlm.platform.groups import shutdown
    from megavlm.runtime.session import start

    start(Settings(**settings), training=True)
    assert any(isinstance(value, dist.ProcessGroup) for value in vars(parallel_state).values())
    shutdown()
    return [name for name, value in vars(parallel_state).items() if isinstance(value, dist.ProcessGroup)]


def test_no_process_group_is_kept(toys, world2) -> None:
    """A process that is forked later would wait for the threads of such a group (`megavlm plan` forks)."""
    assert world2.run(groups_left, settings_of(toys.folder("dense"), {"tensor": 2}, seq_length=512, lr=0.1)) == [[], []]
