"""Fixtures that several files of this folder use."""

from inspected import inspect
from prepared import copied, forked_indexing, jsonl, records, shards

__all__ = ["copied", "forked_indexing", "inspect", "jsonl", "records", "shards"]
