"""From the numbers of results.json to tables and pages."""
