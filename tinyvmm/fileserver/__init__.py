"""The 9P file server: sessions, fids and trees; a message in, a message out."""
