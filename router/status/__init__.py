"""The router's state at one instant, for people and tools that watch it: one snapshot, served as JSON and as a page."""
