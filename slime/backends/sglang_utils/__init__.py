"""Import paths that existing plug-ins use; the code lives in `slime.backends.sglang` and `slime.utils`."""
