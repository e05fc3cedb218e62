"""How one version of the weights reaches every engine, and how that is proved."""
