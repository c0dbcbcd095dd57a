"""How KV cache bytes get from a prefill worker to a decode worker."""
