"""Modelling code that `ernie5 convert --to ernie5-hf` copies beside the weights; it imports nothing of ernie5."""
