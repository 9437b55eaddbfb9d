"""How much memory keys and values may take on a rank."""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from megavlm.base.errors import UserError
from megavlm.model.vlm import VLM
from megavlm.rollout.blocks import BLOCK_TOKENS


@dataclass(frozen=True)
class Memory:
    """The memory for keys and values on a rank.

    Attributes:
        blocks: number of blocks.
        block_bytes: bytes of a block in all layers of the pipeline stage with most of them.
        gib: the limit in GiB.
        setting: name of the setting that gives it.
    """

    blocks: int
    block_bytes: int
    gib: float
    setting: str

    @classmethod
    def of(cls, view: VLM, gib: float, setting: str) -> "Memory":
        """Divides ``gib`` into blocks. Call it on all ranks."""
        config = view.decoder_config
        kv_heads = max(1, (config.num_query_groups or config.num_attention_heads) // view.parallel.tensor)
        layers = torch.tensor(sum(len(chunk.decoder.layers) for chunk in view.language))
        dist.all_reduce(layers, op=dist.ReduceOp.MAX, group=view.groups.model_parallel_host)
        of_token = 2 * int(layers) * kv_heads * (config.kv_channels or 0) * config.params_dtype.itemsize
        return cls(int(gib * 2**30 // (of_token * BLOCK_TOKENS)), of_token * BLOCK_TOKENS, gib, setting)

    def check(self, needed: int, length: int, source: str) -> None:
        """Raises UserError if a prompt with one answer can never have its memory.

        Args:
            needed: blocks that they need.
            length: number of tokens of the prompt.
            source: where it comes from.
        """
        if needed > self.blocks:
            raise UserError(
                f"{source}: the prompt has {length} tokens; with one answer its keys and values need "
                f"{needed * self.block_bytes / 2**30:.3g} GiB on a rank, but {self.setting} is {self.gib:.3g}",
                f"raise {self.setting}, lower the maximum number of new tokens, or leave this prompt out",
            )
