"""Settings that were renamed. An old name is an error, and the message gives the new name."""

RENAMED = {
    "align.offload_reference": "align.offload",
    "data.align": "data.pad_multiple",
    "data.row_patches": "data.max_patches_per_row",
    "train.thaw": "train.unfreeze_after",
    "train.rehearsal": "train.memory_check",
    "vision.deal": "vision.balance",
}
"""The new key for each old key."""
