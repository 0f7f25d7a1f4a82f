"""What embed wrote: search, near duplicates, probes."""
