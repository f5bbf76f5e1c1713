"""Prompt sources: procedural tasks and files, with a resumable cursor. No torch here."""
