"""What a run shows and leaves: console, metrics, samples, W&B, summary and report."""
