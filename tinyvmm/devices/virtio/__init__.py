"""Virtio 1.2: the split queue, its transports, and one file for each device type."""
