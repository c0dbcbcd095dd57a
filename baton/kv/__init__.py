"""KV cache: what it looks like on the wire, who holds which block, and the tensors themselves."""
