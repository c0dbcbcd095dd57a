"""The whole of Baton under load: router, gRPC, workers, Ray. Each module is a measurement with a command; `make bench-serve` runs all."""
