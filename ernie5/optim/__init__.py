"""Parameter groups, optimizers, learning-rate schedules and gradient clipping."""
