"""Adapters beside Megatron's linears: LoRA, DoRA, FourierFT; bases in 4 bits."""
