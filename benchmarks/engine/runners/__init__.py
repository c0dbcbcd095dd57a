"""One program per engine, which measures the cells that it reads. Each runs in its engine's own environment."""
