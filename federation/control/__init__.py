"""The level-5 loop, its guard, actuation and the audit trail."""
