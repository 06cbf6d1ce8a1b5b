"""The medical twin: ambulances, hospitals and patients of a region."""
