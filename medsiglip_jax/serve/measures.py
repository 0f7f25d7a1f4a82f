"""What /metrics tells, in Prometheus' format: numbers and names of routes, never content."""

from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Measures:
    """Counters of one server; two in a process do not share them."""

    media_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        prefix = "medsiglip_jax"
        self._requests = Counter(
            f"{prefix}_requests", "Answers by route and status", ["route", "code"],
            registry=registry,
        )  # fmt: skip
        self._errors = Counter(
            f"{prefix}_instance_errors", "Instances answered with an error", ["code"],
            registry=registry,
        )  # fmt: skip
        self._bytes = Counter(f"{prefix}_body_bytes", "Bytes of bodies read", registry=registry)
        self._seconds = Histogram(
            f"{prefix}_request_seconds", "From the first byte to the answer", ["route"],
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self._wait = Histogram(
            f"{prefix}_queue_wait_seconds", "Of rows, for the device", ["kind"], buckets=_SECONDS,
            registry=registry,
        )  # fmt: skip
        self._batch = Histogram(
            f"{prefix}_batch_rows", "Rows of a batch, without padding", ["kind"], buckets=_ROWS,
            registry=registry,
        )  # fmt: skip
        self._device = Counter(f"{prefix}_device_seconds", "Device at work", registry=registry)
        self._failures = Counter(
            f"{prefix}_device_failures", "Batches that the device failed on", ["error"],
            registry=registry,
        )  # fmt: skip
        self._depth = Gauge(f"{prefix}_queue_rows", "Rows waiting", registry=registry)
        self._pending = Gauge(f"{prefix}_pending_rows", "Rows accepted", registry=registry)
        self._hits = Counter(
            f"{prefix}_text_cache", "Texts by whether they were known", ["known"],
            registry=registry,
        )  # fmt: skip

    def request(self, route: str, code: int, seconds: float, size: int) -> None:
        """One answer to a request whose body had `size` bytes."""
        self._requests.labels(route, str(code)).inc()
        self._seconds.labels(route).observe(seconds)
        self._bytes.inc(size)

    def instance_error(self, code: str) -> None:
        """One instance that was answered with an error."""
        self._errors.labels(code).inc()

    def batch(self, kind: str, rows: int, waits: Sequence[float]) -> None:
        """A batch was taken for the device; its rows had waited so many seconds."""
        self._batch.labels(kind).observe(rows)
        for seconds in waits:
            self._wait.labels(kind).observe(seconds)

    def device(self, seconds: float) -> None:
        """The device has worked for so long."""
        self._device.inc(seconds)

    def device_failed(self, error: Exception) -> None:
        """A batch failed; only the type of the error is kept."""
        self._failures.labels(type(error).__name__).inc()

    def text(self, known: bool) -> None:
        """A text was looked up in the cache."""
        self._hits.labels("yes" if known else "no").inc()

    def watch(self, depth: Callable[[], int], pending: Callable[[], int]) -> None:
        """Asks these for the length of the queue when /metrics is read."""
        self._depth.set_function(depth)
        self._pending.set_function(pending)

    def text_format(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)
