"""Weights from the learner's rank 0 to the rollout workers: one interface, three carriers."""
