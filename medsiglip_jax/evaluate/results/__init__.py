"""From scores to numbers: everything that results.json holds, without the model."""
