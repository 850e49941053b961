"""C++ for the CPU: what the operators' `native.py` files call (README of `kernels/`)."""
