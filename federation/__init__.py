"""Federation of digital twins: shared time, shared state, coupled scenarios, joint plans."""

import os

DISTRIBUTION = "multitwin"
"""Whose package this is: other projects use the import name too."""

# One thread per process, set before numpy is loaded: sums taken in another order have other
# bits, and a run must give the same ones wherever it is done.
for _library in ("OMP", "OPENBLAS", "MKL", "NUMBA"):
    os.environ.setdefault(f"{_library}_NUM_THREADS", "1")

# Errors reach people in our own words, without the transport's log lines before them.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
