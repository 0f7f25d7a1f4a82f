"""results.json as tables, pages and pictures."""
