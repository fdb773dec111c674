"""What we put inside a guest: an initramfs, and PID 1 made by our own assembler."""
