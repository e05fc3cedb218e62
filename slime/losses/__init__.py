"""Formulas on tensors: log-probs, KL, policy, value, corrections, aggregation, advantages. Imports torch only."""
