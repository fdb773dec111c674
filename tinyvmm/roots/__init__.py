"""What a guest's root is made of, and how it gets there."""
