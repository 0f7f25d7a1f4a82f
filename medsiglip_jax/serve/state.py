"""Whether the server loads, answers or drains: what its routes ask first."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from medsiglip_jax.embeddings.probe.linear import Probe
from medsiglip_jax.embeddings.probe.prediction import check_model
from medsiglip_jax.model.api import Model
from medsiglip_jax.serve.corpus import Corpus
from medsiglip_jax.serve.errors import RequestError
from medsiglip_jax.serve.held import Held
from medsiglip_jax.serve.measures import Measures
from medsiglip_jax.serve.service import Service
from medsiglip_jax.serve.settings import Settings

# The name by which a request asks for the classifier that a model was fine-tuned with.
CLASSIFIER = "classifier"
_RETRY = {"Retry-After": "5"}


@dataclass
class State:
    """One server.

    Attributes:
        settings: what it was started with.
        name: of the model, as requests and answers have it.
        measures: what /metrics tells.
        service: None while the model is loaded.
        corpus: the embeddings that are searched, if any.
        probes: by the names that requests have.
        held: bytes of requests that are being answered.
        draining: it is asked to end: it still answers, and is no longer ready.
    """

    settings: Settings
    name: str
    measures: Measures = field(default_factory=Measures)
    service: Service | None = None
    corpus: Corpus | None = None
    probes: Mapping[str, Probe] = field(default_factory=dict)
    held: Held = field(init=False)
    draining: bool = False

    def __post_init__(self):
        self.held = Held(self.settings.max_held)

    def current(self) -> Service:
        """The service.

        Raises:
            RequestError: 503, there is none yet.
        """
        if self.service is None:
            raise RequestError(503, "the model is being loaded", _RETRY)
        return self.service

    def check_model(self, name: str) -> None:
        """Accepts the name of the model, with or without the organisation before it.

        Raises:
            RequestError: 404, it is another.
        """
        if name not in (self.name, PurePosixPath(self.name).name):
            raise RequestError(404, f"model: not served here; expected {self.name}")

    def check(self, model: Model) -> None:
        """Raises ValueError if probes or embeddings were made with another model."""
        if model.config.classifier and CLASSIFIER in self.probes:
            raise ValueError(f"probe {CLASSIFIER}: the model has one of its own; rename the file")
        for name, probe in self.probes.items():
            try:
                check_model(probe, model)
            except ValueError as error:
                raise ValueError(f"probe {name}: {error}") from None
        if self.corpus is not None:
            self.corpus.check(model)

    @property
    def alive(self) -> bool:
        """Whether it is no use to wait any longer: false asks to be started anew."""
        return self.service is None or self.service.alive

    @property
    def ready(self) -> bool:
        """Whether new requests should come here."""
        return self.service is not None and self.service.ready and not self.draining
