"""OpenAI's embeddings, for texts and, in the forms of infinity and of vLLM, for images.

Written for what openai 3.57 sends; images come as `modality: "image"` with data URIs or addresses
as `input` (infinity 0.0.77), or as `messages` with an `image_url` (vLLM 0.9, its chat embeddings).
Vectors are normalised. The contract has no error of a single input: one that is wrong is a 400 that
names it. Fields that are unknown are ignored, as other servers of this contract have more.
"""

import base64
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from starlette.requests import Request

from medsiglip_jax.serve.errors import RequestError, wrong_field
from medsiglip_jax.serve.fields import Fields
from medsiglip_jax.serve.http import endpoint, getter
from medsiglip_jax.serve.instances import Instance, Text, picture
from medsiglip_jax.serve.openapi import (
    INTEGER,
    STRING,
    VECTOR,
    Described,
    Operation,
    array,
    either,
    obj,
    optional,
)
from medsiglip_jax.serve.service import COUNTS, Service, Vector, embed_all, unit
from medsiglip_jax.serve.state import State

_FIELD = re.compile(r"[a-z_]+(?=[:.\[])")
# By status, OpenAI's words for the type of an error and its code.
_KINDS = {
    404: ("invalid_request_error", "model_not_found"),
    429: ("rate_limit_error", "rate_limit_exceeded"),
    500: ("server_error", None),
    503: ("server_error", None),
}


def routes(state: State) -> Sequence[Described]:
    """/v1/embeddings and /v1/models."""

    async def embed(service: Service, document: Any, request: Request) -> Any:
        fields = Fields(document)
        state.check_model(fields.get("model", str, state.name))
        check_dimensions(service, fields)
        encode = _ENCODINGS[fields.one_of("encoding_format", list(_ENCODINGS), "float")]
        given = dict(_conversation(fields) if "messages" in fields else _inputs(fields))
        vectors = unit(await embed_all(service, given))
        data = [{"object": "embedding", "index": i, "embedding": encode(vector)}
                for i, vector in enumerate(vectors)]  # fmt: skip
        tokens = COUNTS.get().tokens
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"object": "list", "data": data, "model": state.name, "usage": usage}

    model = {"id": state.name, "object": "model", "created": int(time.time()),
             "owned_by": "medsiglip-jax"}  # fmt: skip

    def one_model(request: Request) -> Any:
        state.check_model(request.path_params["model"])
        return model

    models = {"object": "list", "data": [model]}
    return [
        Described("/v1/embeddings", endpoint(state, embed, failed), _EMBEDDINGS),
        Described("/v1/models", getter(lambda _: models, failed), _MODELS),
        Described("/v1/models/{model:path}", getter(one_model, failed), _ONE_MODEL),
    ]


def failed(error: RequestError) -> Any:
    """OpenAI's body of an error; `param` is the field that is wrong."""
    kind, code = _KINDS.get(error.status, ("invalid_request_error", None))
    place = _FIELD.match(error.message)
    problem = {"message": error.message, "type": kind, "param": place and place[0], "code": code}
    return {"error": problem}


def check_dimensions(service: Service, fields: Fields) -> None:
    """Refuses a field "dimensions" of other vectors than the model has."""
    actual = service.model.config.embed_dim
    if fields.number("dimensions", 1, actual) != actual:
        raise wrong_field("dimensions", f"vectors of this model have {actual}, which are not cut")


def _inputs(fields: Fields) -> Iterator[tuple[str, Instance]]:
    modality = fields.one_of("modality", ("text", "image"), "text")
    if fields.is_a("input", list) and any(
        isinstance(i, int | list) for i in fields.get("input", list)
    ):
        problem = "token ids are not taken, since each vocabulary has its own; send strings"
        raise wrong_field("input", problem)
    values = fields.strings("input")
    if not values:
        raise wrong_field("input", "expected at least one string")
    for i, value in enumerate(values):
        place = f"input[{i}]"
        yield place, Text(value) if modality == "text" else picture(value, place)


def _conversation(fields: Fields) -> Iterator[tuple[str, Instance]]:
    """The one text or image of the messages: the model embeds them apart."""
    parts = [part for message in fields.objects("messages") for part in _parts(message)]
    if len(parts) != 1:
        raise wrong_field("messages", f"expected one text or one image_url, got {len(parts)}")
    yield from parts


def _parts(message: Fields) -> Iterator[tuple[str, Instance]]:
    if message.is_a("content", str):
        yield message.at("content"), Text(message.get("content", str))
        return
    for part in message.objects("content"):
        yield from _part(part)


def _part(part: Fields) -> Iterator[tuple[str, Instance]]:
    if part.one_of("type", ("text", "image_url"), "") == "image_url":
        address = part.fields("image_url")
        yield part.where, picture(address.get("url", str), address.at("url"))
    elif text := part.get("text", str):  # clients send an empty text beside an image
        yield part.where, Text(text)


def _base64(vector: Vector) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


_ENCODINGS = {"float": np.ndarray.tolist, "base64": _base64}
_ERROR = obj({"error": obj({"message": STRING, "type": STRING},
                           {"param": optional(STRING), "code": optional(STRING)})})  # fmt: skip
_URL = obj({"type": {"const": "image_url"}, "image_url": obj({"url": STRING})})
_TEXT = obj({"type": {"const": "text"}, "text": STRING})
_MESSAGE = obj({"role": STRING, "content": either(STRING, array(either(_TEXT, _URL)))})
_EMBEDDINGS = Operation(
    "Normalised embeddings of texts or of images",
    body=obj({}, {
        "model": STRING, "input": either(STRING, array(STRING)),
        "modality": {"enum": ["text", "image"]}, "messages": array(_MESSAGE),
        "encoding_format": {"enum": ["float", "base64"]}, "dimensions": INTEGER,
    }),
    example={"input": ["a chest x-ray"]},
    answer=obj({
        "object": {"const": "list"}, "model": STRING,
        "data": array(obj({"object": {"const": "embedding"}, "index": INTEGER,
                           "embedding": either(VECTOR, STRING)})),
        "usage": obj({"prompt_tokens": INTEGER, "total_tokens": INTEGER}),
    }),
    error=_ERROR,
)  # fmt: skip
_MODEL = obj({"id": STRING, "object": {"const": "model"}, "created": INTEGER, "owned_by": STRING})
_MODELS = Operation(
    "The model of this server, in a list",
    obj({"object": {"const": "list"}, "data": array(_MODEL)}),
    error=_ERROR,
)
_ONE_MODEL = Operation("The model of this server", _MODEL, error=_ERROR)
