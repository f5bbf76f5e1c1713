"""Rollout workers: the sampling engine behind a Ray actor, and the pool that keeps them fed."""
