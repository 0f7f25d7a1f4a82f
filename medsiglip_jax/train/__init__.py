"""Fine-tuning: a recipe made ready, the train step, the loop around it."""
