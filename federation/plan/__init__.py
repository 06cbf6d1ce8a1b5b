"""Plans across domains: the blocks of all members joined into one model, solved, applied."""
