"""Triton kernels. The only package that imports triton; pure functions on contiguous tensors, no autograd."""
