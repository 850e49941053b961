"""The training loop, its configuration tree and its command."""
