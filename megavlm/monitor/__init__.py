"""What a run shows while it trains: metrics.jsonl, the terminal, wandb, slow ranks, hangs, samples left out."""
