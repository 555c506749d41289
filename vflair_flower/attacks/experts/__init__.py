"""What hosts of experts and whoever watches the network see, and what they can make of it."""
