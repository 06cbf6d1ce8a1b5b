"""The wire contract in Python, generated from protos/federation/v1 by `make proto`."""
