"""Reads the flags of Megatron-core, SGLang and sglang-router out of their source, without importing them."""
