"""Whether the server loads, answers or drains: what its routes ask first."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from medsiglip_jax.embeddings import provenance
from medsiglip_jax.embeddings.probe.linear import Probe
from medsiglip_jax.embeddings.probe.prediction import check_model
from medsiglip_jax.inference.abstain import Abstention, KnownImages
from medsiglip_jax.model.api import Model
from medsiglip_jax.preprocess.dicom.rules import from_dict
from medsiglip_jax.serve.corpus import Corpus
from medsiglip_jax.serve.errors import RequestError
from medsiglip_jax.serve.held import Held
from medsiglip_jax.serve.measures import Measures
from medsiglip_jax.serve.service import Service
from medsiglip_jax.serve.settings import Settings
from medsiglip_jax.trust import known as trust

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
        known: the images that a reference knows, if unknown ones get no answer.
        abstention: when that is.
        held: bytes of requests that are being answered.
        draining: it is asked to end: it still answers, and is no longer ready.
    """

    settings: Settings
    name: str
    measures: Measures = field(default_factory=Measures)
    service: Service | None = None
    corpus: Corpus | None = None
    probes: Mapping[str, Probe] = field(default_factory=dict)
    known: KnownImages | None = None
    abstention: Abstention | None = None
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
        """Raises ValueError if probes, embeddings or a reference were made with another model, or
        the reference with other pixels than those that are scored here."""
        if model.config.classifier and CLASSIFIER in self.probes:
            raise ValueError(f"probe {CLASSIFIER}: the model has one of its own; rename the file")
        for name, probe in self.probes.items():
            try:
                check_model(probe, model)
            except ValueError as error:
                raise ValueError(f"probe {name}: {error}") from None
        if self.corpus is not None:
            self.corpus.check(model)
        if self.known is not None:
            for what, made in self._scored(model):
                trust.check(self.known, made, "--reference", what)

    def _scored(self, model: Model) -> Iterator[tuple[str, provenance.Provenance]]:
        """How the embeddings are made that /v1/classify scores."""
        preparation = self.settings.prepared(model.config)
        if model.config.text is not None:
            yield (
                "images",
                provenance.of_model(model, preparation.preprocess, True, preparation.dicom),
            )
        for name, probe in self.probes.items():
            preset, normalized = check_model(probe, model)
            rules = from_dict(probe.provenance.dicom)
            made = provenance.of_model(model, preset, normalized, rules)
            yield f"images of probe {name}", made
        if model.config.classifier is not None:
            made = provenance.of_model(
                model.features, preparation.preprocess, False, preparation.dicom
            )
            yield f"images of the {CLASSIFIER}", made

    @property
    def alive(self) -> bool:
        """Whether it is no use to wait any longer: false asks to be started anew."""
        return self.service is None or self.service.alive

    @property
    def ready(self) -> bool:
        """Whether new requests should come here."""
        return self.service is not None and self.service.ready and not self.draining
