"""Prompts in, rewarded samples out: data sources, generation, rewards, filters and evaluation."""
