"""The visual tokenizer: causal convolutional codec and multi-scale bit-wise quantiser."""
