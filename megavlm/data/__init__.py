"""From files of samples to rows of tokens: reading, rendering, packing."""
