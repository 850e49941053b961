"""The unified backbone: embeddings, attention, mixture-of-experts layers, heads; single-device PyTorch throughout."""
