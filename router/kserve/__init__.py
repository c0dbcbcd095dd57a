"""The Open Inference Protocol on the clients' port, for Triton's and KServe's clients: a front of `router.inference`."""
