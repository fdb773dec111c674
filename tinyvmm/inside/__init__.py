"""Reaching into a guest that runs: its files, mounts, processes and users, without an agent."""
