"""Both towers, their weights, and the model object that people load."""
