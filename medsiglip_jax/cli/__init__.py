"""The command `medsiglip-jax`: one file per command, and `main` in `app`."""

from medsiglip_jax.cli.app import main

__all__ = ["main"]
