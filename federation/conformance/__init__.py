"""Grades whatever serves `federation.v1.Twin`, by what the contract promises."""
