"""megavlm: Qwen3-VL training on Megatron-core."""

__version__ = "0.1.0"
