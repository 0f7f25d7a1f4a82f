"""Pixels (`image`, `decode`) and tokens (`text`): from files and strings to model inputs."""
