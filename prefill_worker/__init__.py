"""The prefill worker: computes prompts' KV caches and hands them over."""
