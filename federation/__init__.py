"""Federation of digital twins: shared time, shared state, coupled scenarios, joint plans."""
