"""The gate of SeerAttention-R: its file, where it is found, and its training."""
