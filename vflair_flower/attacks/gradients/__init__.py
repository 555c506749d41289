"""Gradient inversion: text from gradients of parameters."""
