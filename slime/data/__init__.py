"""Samples to tensors: rewards to train data, balance over data-parallel ranks, micro-batch plan, packing, context-parallel slices."""
