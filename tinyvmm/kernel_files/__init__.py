"""Kernel files, read: what is in them, unpacked, and what a loader puts where."""
