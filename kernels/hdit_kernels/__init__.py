"""Neighborhood attention, tensors in and tensors out: one contract, several backends."""

from hdit_kernels.neighborhood import BACKENDS, neighborhood_attention, select_backend

__all__ = ["BACKENDS", "neighborhood_attention", "select_backend"]
