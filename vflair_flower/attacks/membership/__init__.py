"""Membership inference: who was trained on, from the finished model."""
