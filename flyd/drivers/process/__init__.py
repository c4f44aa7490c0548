"""Machines as process groups of the host: the embedded default."""
