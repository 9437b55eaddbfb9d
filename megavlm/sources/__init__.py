"""Sources of samples: JSONL files and folders of shards with random access, and their blend."""
