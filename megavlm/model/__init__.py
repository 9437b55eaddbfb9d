"""Qwen3-VL on Megatron-core's modules."""
