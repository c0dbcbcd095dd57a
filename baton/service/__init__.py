"""What every Baton process needs to be a gRPC service: server, status mapping, metrics, logging, membership."""
