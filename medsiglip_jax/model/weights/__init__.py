"""Checkpoints: one reader and writer per layout."""
