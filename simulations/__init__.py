"""The Flower app of this repository: the main job, how it is launched, and what is written down of it."""
