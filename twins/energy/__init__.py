"""The energy twin: the power grid of a region, its damage, its load shedding and its repair."""

from twins.energy.twin import EnergyTwin

__all__ = ["EnergyTwin"]
