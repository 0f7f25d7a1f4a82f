"""The objectives by the name that a recipe calls them; the first is the default."""

from medsiglip_jax.train.objectives.classification import Classification
from medsiglip_jax.train.objectives.contrastive import Contrastive

OBJECTIVES = {kind.name: kind for kind in (Contrastive, Classification)}
