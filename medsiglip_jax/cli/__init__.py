"""The command `medsiglip-jax`: one file per command, and `main` in `app`."""

from medsiglip_jax import lazy

__getattr__, __dir__ = lazy(__name__, app="main")
