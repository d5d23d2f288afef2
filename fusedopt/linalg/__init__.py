"""Orthogonalization of matrices by Newton-Schulz iterations."""
