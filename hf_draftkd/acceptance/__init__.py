"""The arithmetic of speculative decoding: tensors in, numbers out."""
