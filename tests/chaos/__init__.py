"""Breaks a federation in every way that its design names, and holds it to its word.

`python -m tests.chaos` prints progress on standard error and one JSON line on standard output.
"""
