"""Filters that decide which groups of samples are worth training on."""
