"""Programs of tile operations, and the scalar functions that they run."""
