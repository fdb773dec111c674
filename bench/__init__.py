"""What produces every figure that the project states: `python -m bench [NAME]...`."""
