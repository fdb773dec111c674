"""Devices: one file each. Read debug_exit.py first, then uart.py."""
