"""Processes and devices: the cluster, placement, actors, and what to do when one of them fails."""
