"""Coupled experiments: what a scenario says, how it is run, and what came of it."""
