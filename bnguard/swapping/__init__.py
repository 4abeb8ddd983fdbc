"""Swap BN for another norm, and distil the original network into the swapped copy."""
