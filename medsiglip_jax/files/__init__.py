"""Files and folders on disks and in buckets: places, locks, settings, and one way to write."""

from medsiglip_jax import lazy

__getattr__, __dir__ = lazy(
    __name__, places="Place at is_remote open_binary read_bytes",
    storage="Lines new_file new_folder read_lines", locks="lock", settings="Check Variants build",
    json="",
)  # fmt: skip
