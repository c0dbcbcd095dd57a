"""The protocol by which foreign routers drive workers: `vllm.grpc.engine.VllmEngine`, in Baton's terms."""
