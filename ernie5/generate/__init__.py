"""Turns a checkpoint into text, pictures, clips and speech: caches, sampling, one file per modality."""
