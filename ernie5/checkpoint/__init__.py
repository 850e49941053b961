"""Checkpoints: layout-free safetensors and JSON, atomic, checksummed, strict."""
