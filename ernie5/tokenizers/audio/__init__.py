"""Audio tokenizer: log-mel features, residual vector quantiser, 12.5 Hz codec, and its training losses."""
