"""Adapters on Megatron's linear layers (LoRA, DoRA, FourierFT), and base weights in 4 bits."""
