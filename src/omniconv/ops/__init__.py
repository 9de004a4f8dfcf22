"""The machinery that every operator shares: checks, grids, sequences, layers, activations, references, error bounds, the record."""
