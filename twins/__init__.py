"""The four domain twins of the coupled-infrastructure region models."""

DISTRIBUTION = "multitwin"
"""Whose package this is: other projects use the import name too."""
