"""Prompt sources: procedural tasks, records of any shape, benchmarks, mixtures; with a resumable cursor. No torch here."""
