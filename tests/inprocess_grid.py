"""A Flower grid in this process, under the name that tests know."""

from simulations.local_grid import LocalGrid as InProcessGrid

__all__ = ["InProcessGrid"]
