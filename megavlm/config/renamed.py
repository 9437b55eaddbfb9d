"""Settings that had another name once: an old name is an error that gives the new one."""

RENAMED = {
    "data.align": "data.pad_multiple",
    "data.row_patches": "data.max_patches_per_row",
    "train.thaw": "train.unfreeze_after",
    "train.rehearsal": "train.memory_check",
    "vision.deal": "vision.balance",
}
"""Old key: new key."""
