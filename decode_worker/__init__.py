"""The decode worker: takes KV caches and generates tokens."""
