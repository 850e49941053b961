"""Measures a checkpoint against baselines, and draws a run directory as one self-contained page."""
