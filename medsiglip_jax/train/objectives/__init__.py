"""What a model can be trained for; a new objective is a file here and a line in `table`."""

from medsiglip_jax import lazy

__getattr__, __dir__ = lazy(
    __name__, objective="Objective", table="OBJECTIVES", contrastive="Contrastive",
    classification="Classification",
)  # fmt: skip
