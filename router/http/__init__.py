"""The router's HTTP port: the OpenAI API, health and metrics. A front beside gRPC's; what it serves is `router.inference`'s."""
