"""Prepares WebDataset shards: writes them from JSONL files and their media, and indexes them with megatron-energon."""
