"""Programs that use the package: benchmarks, training, races and pictures."""
