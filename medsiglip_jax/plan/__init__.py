"""Whether a run fits a TPU slice, and what bounds its speed: its step, compiled without a TPU."""
