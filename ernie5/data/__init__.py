"""From shards of samples to packed batches, a pure function of (seed, step)."""
