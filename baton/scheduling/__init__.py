"""Pure scheduling decisions: state in, plan out. No torch, no clock, no await."""
