"""Monitoring of a run: metrics.jsonl, the terminal, wandb, slow ranks, hangs and skipped samples."""
