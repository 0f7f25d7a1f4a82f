"""TensorFlow for the input of training: a tf.data pipeline, its service, and decoding kernels."""

from medsiglip_jax import lazy

__getattr__, __dir__ = lazy(
    __name__, kernels="tf_codec", pipeline="dataset epoch_dataset batches epoch_batches",
    encoded="pp_dataset", ops="pp", service="",
)  # fmt: skip
