"""Parallel degrees and the grid of ranks."""
