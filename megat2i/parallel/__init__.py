"""Tensor, sequence and pipeline parallelism: who holds which part of a tensor, and how the parts talk."""
