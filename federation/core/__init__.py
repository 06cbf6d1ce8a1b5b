"""The pure core: events in, effects out; no clock, randomness, socket, thread or solver."""
