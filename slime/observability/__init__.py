"""Shows a run: metric names, the step line, TensorBoard and W&B, samples, dumps, traces and the run report."""
