"""Faults, their healthy twins, and healthy runs: what the rules are measured on."""
