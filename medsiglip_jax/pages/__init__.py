"""Pages that people look at: HTML, charts, contact sheets."""

from medsiglip_jax import lazy

__getattr__, __dir__ = lazy(
    __name__, html="page", charts="Axis Estimate Series forest lines",
    contact_sheet="Sheet SheetCell SheetSection",
)  # fmt: skip
