"""Our own routes: scores of images against texts, by a probe or by the model's own classifier."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from starlette.requests import Request

from medsiglip_jax.embeddings.probe.linear import Probe
from medsiglip_jax.inference import classifier
from medsiglip_jax.inference.abstain import Abstention
from medsiglip_jax.inference.classify import probabilities
from medsiglip_jax.preprocess.dicom.rules import from_dict
from medsiglip_jax.serve.errors import InstanceError, RequestError, wrong_field
from medsiglip_jax.serve.fields import Fields
from medsiglip_jax.serve.http import endpoint, getter
from medsiglip_jax.serve.instances import Picture, Reading, Text, picture
from medsiglip_jax.serve.openapi import (
    BOOLEAN,
    INTEGER,
    NUMBER,
    ONE_PIXEL,
    STRING,
    Described,
    Operation,
    array,
    either,
    obj,
    optional,
)
from medsiglip_jax.serve.service import COUNTS, Service, Vectors, unit
from medsiglip_jax.serve.state import CLASSIFIER, State


@dataclass(frozen=True)
class Scoring:
    """How images get scores.

    Attributes:
        score: vectors of an image -> scores of texts or labels.
        normalize: what is done to the vectors first.
        exclusive: whether an image has exactly one label.
    """

    score: Callable[[Vectors], list[dict[str, Any]]]
    normalize: Callable[[Vectors], Vectors]
    exclusive: bool = False


def routes(state: State) -> Sequence[Described]:
    """/v1/classify and /v1/info."""

    async def classify(service: Service, document: Any, request: Request) -> Any:
        fields = Fields(document)
        fields.only("model", "images", "texts", "probe")
        name = fields.get("probe", str, "")
        if bool(name) == ("texts" in fields):
            raise RequestError(400, "expected either texts, or the name of a probe")
        read = by_probe if name else by_texts
        results = await read(state, service, fields)
        return {"model": state.name, "cut": COUNTS.get().cut, "results": results}

    return [
        Described("/v1/classify", endpoint(state, classify, failed), _CLASSIFY),
        Described("/v1/info", getter(lambda _: describe(state)), _INFO),
    ]


def failed(error: RequestError) -> Any:
    """The body of an error on our own routes."""
    return {"error": {"code": error.status, "message": error.message}}


def describe(state: State) -> dict[str, Any]:
    """What a client may want to know before it asks."""
    from medsiglip_jax import __version__

    config = state.service.model.config if state.service else None
    heads = [CLASSIFIER] if config and config.classifier else []
    return {
        "model": state.name,
        "version": __version__,
        "ready": state.ready,
        "image_size": config.image_size if config else None,
        "embed_dim": config.embed_dim if config else None,
        "probes": heads + sorted(state.probes),
        "search": state.corpus is not None,
    }


async def by_texts(state: State, service: Service, fields: Fields) -> list[Any]:
    """Each image against each text: logit, sigmoid, and softmax over the texts."""
    texts = fields.items("texts", str)
    if not texts or not all(text.strip() for text in texts):
        raise wrong_field("texts", "expected at least one, none of them empty")
    pictures = images(fields, service.default_reading)
    answers = await service.embed([*map(Text, texts), *pictures])
    of_texts, rest = answers[: len(texts)], answers[len(texts) :]
    for i, text in enumerate(of_texts):
        if isinstance(text, InstanceError):
            raise wrong_field(f"texts[{i}]", text.description)
    ztxt = np.stack([unit(text)[0] for text in of_texts if not isinstance(text, InstanceError)])

    def score(vectors: Vectors) -> list[dict[str, Any]]:
        logits = service.similarity(np.stack(unit(vectors)), ztxt)
        sigmoid, softmax = probabilities(logits)
        rows = zip(texts, logits[0], sigmoid[0], softmax[0], strict=True)
        return [
            {"text": t, "logit": float(x), "sigmoid": float(p), "softmax": float(q)}
            for t, x, p, q in rows
        ]

    return await _results(state, service, rest, Scoring(score, unit))


async def by_probe(state: State, service: Service, fields: Fields) -> list[Any]:
    """Each image by a probe, or by the classifier, read as in its training."""
    name = fields.get("probe", str)
    if name == CLASSIFIER and service.model.config.classifier is not None:
        reading, scoring = _of_classifier(service)
    elif name in state.probes:
        reading, scoring = _of_probe(service, state.probes[name])
    else:
        known = ", ".join(describe(state)["probes"]) or "none (--probe)"
        raise wrong_field("probe", f"not one of this server's, which are: {known}")
    return await _results(state, service, await service.embed(images(fields, reading)), scoring)


def images(fields: Fields, reading: Reading) -> list[Picture | InstanceError]:
    """The field "images": base64, data URIs, addresses, or objects with "bytes" or "url"."""
    return [
        image(value, f"{fields.at('images')}[{i}]", reading)
        for i, value in enumerate(fields.elements("images"))
    ]


def image(value: Any, where: str, reading: Reading) -> Picture | InstanceError:
    """One image of a request."""
    if isinstance(value, dict):
        fields = Fields(value, where)
        fields.only("bytes", "url")
        if ("bytes" in fields) == ("url" in fields):
            raise wrong_field(where, "expected either bytes or url")
        if "bytes" in fields:
            return Picture(content=fields.get("bytes", str), reading=reading)
        return Picture(address=fields.get("url", str), reading=reading)
    if not isinstance(value, str):
        raise wrong_field(where, "expected a string, or an object with bytes or url")
    try:
        return picture(value, where, reading)
    except InstanceError as error:
        return error


def _of_probe(service: Service, probe: Probe) -> tuple[Reading, Scoring]:
    made = probe.provenance
    assert made.preprocess is not None  # or `State.check` has refused it
    rules = service.bounded(from_dict(made.dicom))
    normalize = unit if made.normalized else list

    def score(vectors: Vectors) -> list[dict[str, Any]]:
        shares = probe.predict(np.stack(normalize(vectors)))
        rows = zip(probe.classes, shares[0], probe.positive(shares)[0], strict=True)
        return [
            {"label": label, "probability": _number(p), "positive": bool(positive)}
            for label, p, positive in rows
        ]

    return Reading(made.preprocess, rules), Scoring(score, normalize, probe.exclusive)


def _of_classifier(service: Service) -> tuple[Reading, Scoring]:
    config = service.model.config
    assert config.classifier is not None and config.vision is not None
    kind = "image" if config.classifier.pool == config.vision.pool else "features"

    def score(vectors: Vectors) -> list[dict[str, Any]]:
        logits, shares, positive = classifier.scores(service.model, np.stack(vectors))
        assert config.classifier is not None
        rows = zip(config.classifier.labels, logits[0], shares[0], positive[0], strict=True)
        return [
            {"label": label, "logit": float(x), "probability": float(p), "positive": bool(y)}
            for label, x, p, y in rows
        ]

    scoring = Scoring(score, list, not config.classifier.multi_label)
    return replace(service.default_reading, kind=kind), scoring


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None  # a finding that could not be fitted


async def _results(
    state: State,
    service: Service,
    answers: Sequence[Vectors | InstanceError],
    scoring: Scoring,
) -> list[Any]:
    def scored() -> list[Any]:
        return [
            {"error": a.to_dict()}
            if isinstance(a, InstanceError)
            else _answer(a, scoring, state.abstention)
            for a in answers
        ]

    return await service.run(scored)


def _answer(vectors: Vectors, scoring: Scoring, abstention: Abstention | None) -> dict[str, Any]:
    """The scores of one image or, if there is a reference, maybe why there are none."""
    scores = scoring.score(vectors)
    if abstention is None:
        return {"scores": scores}
    shares = [score.get("probability", np.nan) for score in scores]
    labels = [score["label"] for score in scores] if "label" in scores[0] else []
    probabilities = np.array([shares], float) if labels else None
    rows = np.stack(scoring.normalize(vectors))
    distances, [reason] = abstention.judge(rows, probabilities, labels, scoring.exclusive)
    judged = {"distance": float(distances[0])}
    return judged | ({"no_assist": reason} if reason else {"scores": scores})


NATIVE_ERROR = obj({"error": obj({"code": INTEGER, "message": STRING})})
IMAGE = either(STRING, obj({"bytes": STRING}), obj({"url": STRING}))
_SCORES = array(either(
    obj({"text": STRING, "logit": NUMBER, "sigmoid": NUMBER, "softmax": NUMBER}),
    obj({"label": STRING, "probability": optional(NUMBER), "positive": BOOLEAN}, {"logit": NUMBER}),
))  # fmt: skip
_CLASSIFY = Operation(
    "Scores of each image against texts, or by a probe or the model's own classifier",
    body=obj(
        {"images": array(IMAGE)},
        {"texts": array(STRING), "probe": STRING},
    ),
    example={"images": [{"bytes": ONE_PIXEL}], "texts": ["a cat", "a dog"]},
    answer=obj({
        "model": STRING, "cut": INTEGER,
        "results": array(either(
            obj({"scores": _SCORES}, {"distance": NUMBER}),
            obj({"no_assist": STRING, "distance": NUMBER}),
            obj({"error": obj({"code": STRING, "description": STRING})}),
        )),
    }),
    error=NATIVE_ERROR,
)  # fmt: skip
_INFO = Operation(
    "What the model and the server are",
    obj({"model": STRING, "version": STRING, "ready": BOOLEAN, "search": BOOLEAN,
         "image_size": optional(INTEGER), "embed_dim": optional(INTEGER),
         "probes": array(STRING)}),
    error=NATIVE_ERROR,
)  # fmt: skip
