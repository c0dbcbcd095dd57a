"""Sessions: what the router remembers of conversations, where it is stored, and how a turn uses it."""
