"""Samples to tensors: train data, balance over data-parallel ranks, micro-batch plan, packing, context slices."""
