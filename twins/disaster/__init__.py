"""The disaster twin: an earthquake, its aftershocks, what they break and whom they hurt."""
