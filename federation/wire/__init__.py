"""The contract between core and network: the only package that knows both protos and gRPC."""
