"""The city twin: the roads of a region and its water network."""
