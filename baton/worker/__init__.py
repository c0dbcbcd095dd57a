"""Workers as Ray actors and as commands: what prefill and decode share above `baton.service`. Imports Ray."""
