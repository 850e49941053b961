"""What runs one optimizer step: the plain-PyTorch yardstick and DeepSpeed behind one interface."""
