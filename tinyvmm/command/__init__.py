"""One command in one virtual machine: `run.py` has the whole story."""
