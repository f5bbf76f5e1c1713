"""What a run shows and leaves: console, metrics.jsonl, W&B, samples, report."""
