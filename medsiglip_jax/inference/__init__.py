"""A trained model over many files: embeddings, zero-shot scores, heatmaps, previews."""
