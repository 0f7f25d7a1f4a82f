"""Hugging Face's inference API: zero-shot image classification, and feature extraction.

Written for what InferenceClient of huggingface_hub 2.4 sends to an address; that of an Inference
Endpoint is the root, those of the hosted API name model and task. The contract has no error of a
single input: one that is wrong is a 400 that names it. Parameters that are not known are ignored,
as there.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from starlette.requests import Request

from medsiglip_jax.inference.classify import probabilities
from medsiglip_jax.serve.contracts.openai import check_dimensions
from medsiglip_jax.serve.errors import RequestError, wrong_field
from medsiglip_jax.serve.fields import Fields
from medsiglip_jax.serve.http import endpoint
from medsiglip_jax.serve.instances import Instance, Text, picture
from medsiglip_jax.serve.openapi import (
    BOOLEAN,
    NUMBER,
    ONE_PIXEL,
    STRING,
    VECTOR,
    Described,
    Operation,
    array,
    either,
    obj,
)
from medsiglip_jax.serve.service import COUNTS, Service, embed_all, unit
from medsiglip_jax.serve.state import State

ZERO_SHOT, TEXTS, IMAGES = (
    "zero-shot-image-classification", "feature-extraction", "image-feature-extraction",
)  # fmt: skip
_LONGEST = 10_000  # characters of a template, which is repeated for each label
_TEMPLATE = "This is a photo of {}."  # transformers' default for this task
_PATHS = ("/", "/models/{model:path}/pipeline/{task}", "/pipeline/{task}/{model:path}",
          "/models/{model:path}")  # fmt: skip


def routes(state: State) -> Sequence[Described]:
    """The root, and the paths of the hosted API."""

    async def infer(service: Service, document: Any, request: Request) -> Any:
        state.check_model(request.path_params.get("model", state.name))
        fields = Fields(document)
        parameters = fields.fields("parameters") if "parameters" in fields else Fields({})
        usual = ZERO_SHOT if "candidate_labels" in parameters else TEXTS
        task = request.path_params.get("task", usual)
        if task not in (ZERO_SHOT, TEXTS, IMAGES):
            raise RequestError(404, f"task: expected {ZERO_SHOT}, {TEXTS} or {IMAGES}")
        if task == ZERO_SHOT:
            return await _classify(service, fields, parameters)
        return await _extract(service, fields, task)

    answer = endpoint(state, infer)
    return [Described(path, answer, _INFERENCE) for path in _PATHS]


async def _classify(service: Service, fields: Fields, parameters: Fields) -> Any:
    """The sigmoid of each label's logit, the highest first, as transformers scores SigLIP."""
    labels = parameters.items("candidate_labels", str)
    template = parameters.get("hypothesis_template", str, _TEMPLATE)
    if not labels:
        raise wrong_field("parameters.candidate_labels", "expected at least one")
    if template.count("{}") != 1 or len(template) > _LONGEST:
        problem = f"expected {{}} in it, once, for the label, and at most {_LONGEST:,} characters"
        raise wrong_field("parameters.hypothesis_template", problem)
    service.queue.check_count(len(labels) + 1)
    given: dict[str, Instance] = {"inputs": picture(fields.get("inputs", str), "inputs")}
    for i, label in enumerate(labels):
        given[f"parameters.candidate_labels[{i}]"] = Text(template.replace("{}", label))
    zimg, *ztxt = unit(await embed_all(service, given))
    logits = service.similarity(zimg[None], np.stack(ztxt))
    scores = probabilities(logits)[0][0]
    return [{"score": float(scores[i]), "label": labels[i]} for i in np.argsort(-scores)]


async def _extract(service: Service, fields: Fields, task: str) -> Any:
    _check_options(service, fields)
    given: dict[str, Instance] = {}
    for i, value in enumerate(fields.strings("inputs")):
        place = f"inputs[{i}]"
        given[place] = Text(value) if task == TEXTS else picture(value, place)
    vectors = await embed_all(service, given)
    if COUNTS.get().cut and not fields.get("truncate", bool, True):
        raise RequestError(400, f"truncate: {COUNTS.get().cut} of the texts are too long")
    normalize = fields.get("normalize", bool, True)
    return [vector.tolist() for vector in (unit(vectors) if normalize else vectors)]


def _check_options(service: Service, fields: Fields) -> None:
    """Those of text-embeddings-inference that this model can follow in one way only."""
    fields.one_of("truncation_direction", ("right", "Right"), "right")
    fields.one_of("encoding_format", ("float",), "float")
    if "prompt_name" in fields:
        raise wrong_field("prompt_name", "this model has no prompts; send the whole text")
    check_dimensions(service, fields)


_INFERENCE = Operation(
    "Scores of one image for each of candidate_labels; without those, vectors of texts, "
    f"normalised unless normalize is false, or of images with the task {IMAGES}",
    body=obj({"inputs": either(STRING, array(STRING))}, {
        "parameters": obj({}, {"candidate_labels": array(STRING), "hypothesis_template": STRING}),
        "normalize": BOOLEAN, "truncate": BOOLEAN,
    }),
    example={"inputs": ONE_PIXEL, "parameters": {"candidate_labels": ["a cat", "a dog"]}},
    answer=either(array(obj({"score": NUMBER, "label": STRING})), array(VECTOR)),
    parameters={"task": ZERO_SHOT},
)  # fmt: skip
