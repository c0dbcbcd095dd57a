"""Baton: language models over gRPC, with prefill and decode on different workers."""

import os

__version__ = "0.1.0"

# gRPC looks once, when it is imported. Left alone, it writes lines of its own between those of the log.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
