"""Deterministic simulation: real loops, virtual time, faults from a seed."""
