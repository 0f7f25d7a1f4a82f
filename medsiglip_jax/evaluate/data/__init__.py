"""Data sets as they lie on disk, as images and labels."""
