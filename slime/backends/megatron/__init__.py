"""Trains with Megatron-core; the only room that imports megatron."""
