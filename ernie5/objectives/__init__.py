"""Losses: sums of nats from the model's output, and their combination into one scalar to optimise."""
