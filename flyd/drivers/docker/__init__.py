"""Machines as containers of the host's own engine."""
