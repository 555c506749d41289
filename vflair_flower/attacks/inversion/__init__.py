"""Model inversion: text from smashed data."""
