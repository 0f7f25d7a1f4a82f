"""Tables, folders and shards of examples, and the batches that are made of them."""

from medsiglip_jax import lazy

__getattr__, __dir__ = lazy(
    __name__, examples="Examples split_by_group", inputs="", listing="expand", rows="Row Rows",
    tables="Table read_table", loader="Input batches", order="Order", tfrecord="", labels="Policy",
    tf="", tfds="", tar="",
)  # fmt: skip
