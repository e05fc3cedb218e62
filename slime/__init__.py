"""slime: post-training large language models with reinforcement learning."""

__version__ = "0.1.0"
