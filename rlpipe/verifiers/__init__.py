"""Verifiers: pure scoring functions, and the pool of processes that runs them. No torch here."""
