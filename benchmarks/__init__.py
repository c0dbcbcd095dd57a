"""Every figure that Baton publishes has its command here; raw results are in `results/`."""
