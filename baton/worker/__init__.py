"""What prefill and decode workers share above `baton.service`: their calls (`calls`), Ray actors and commands, which alone import Ray."""
