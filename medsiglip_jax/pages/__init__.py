"""What people look at: HTML pages, charts, contact sheets."""
