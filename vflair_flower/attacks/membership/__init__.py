"""Who was trained on: attacks on a finished model, and what one training run shows of its privacy."""
