"""Generates without a GPU: a continuous-batching engine on transformers' model code, behind SGLang's HTTP protocol."""
