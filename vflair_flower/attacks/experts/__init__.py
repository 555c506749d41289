"""What hosts of experts and whoever watches the network see."""
