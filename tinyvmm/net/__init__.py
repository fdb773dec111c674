"""What a guest's network interface leads to: a tap of the host's, or passt."""
