"""The inference engine: model, sampler, KV pool and continuous batching behind one protocol."""
