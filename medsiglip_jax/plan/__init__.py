"""Does a run fit a TPU slice, and what bounds its speed: the real step, compiled without a TPU."""
