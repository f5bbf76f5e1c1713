"""rlpipe: reinforcement-learning post-training for diffusion language models on Ray."""

__version__ = "0.1.0"
