"""Volumes beyond their placement: snapshots, copies, sizes, and what is destroyed but kept."""
