"""Supervised training on the learner of RL: `python -m rlpipe.sft`."""
