"""Import paths that users' losses rely on; the code is in `slime.algorithm`, `slime.data` and `slime.losses`."""
