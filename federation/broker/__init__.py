"""The meeting point of a federation: who is there, and the runs they take part in."""
