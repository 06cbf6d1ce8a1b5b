"""A city as a twin: what it lets its peers have, and how it runs for them."""
