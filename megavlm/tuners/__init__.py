"""What learns instead of all weights, or learns them with less: adapters on Megatron's linears, 4-bit bases, GaLore."""
