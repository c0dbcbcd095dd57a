"""The flexible worker: prefill and decode in one process and on one engine, one of which it announces at a time."""
