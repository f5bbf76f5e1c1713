"""Evaluation as a command: `python -m rlpipe.eval`."""
