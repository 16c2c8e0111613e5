"""The fast path of the Llama family over merged weights: the same function in a fraction of the
kernels."""
