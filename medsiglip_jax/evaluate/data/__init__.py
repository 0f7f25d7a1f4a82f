"""A data set on disk, as images and labels."""
