"""A hostile optimiser against the guard, before a simulated town with a referee of its own."""
