"""WebDataset shards made ready for training: written from JSONL and its media, and indexed by megatron-energon."""
