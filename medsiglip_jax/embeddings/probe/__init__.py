"""A linear classifier on embeddings."""
