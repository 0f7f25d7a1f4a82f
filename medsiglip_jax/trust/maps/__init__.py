"""From a score to a map of its reasons: what is explained, three methods, and how good a map is."""
