"""Label inference: labels from gradients and answers."""
