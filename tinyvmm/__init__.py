"""tinyvmm: a virtual machine monitor for Linux/KVM in pure Python.

Importing this package costs next to nothing; names are loaded when first used.
"""

__version__ = "0.1.0"
