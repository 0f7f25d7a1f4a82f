"""An HTTP server for embeddings and scores, which existing clients talk to unchanged."""

from medsiglip_jax import lazy

__getattr__, __dir__ = lazy(__name__, run="Server", settings="Settings", service="Service",
                             errors="InstanceError RequestError")  # fmt: skip
