"""Which formulas this run uses: advantages from rewards, loss from log-probs, metrics; resolves plug-in losses."""
