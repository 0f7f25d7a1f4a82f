"""Search in an embedding run, and the pictures of what is found, for the page and others."""

import contextlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from medsiglip_jax.serve.contracts.native import IMAGE, NATIVE_ERROR, failed, image
from medsiglip_jax.serve.corpus import Corpus
from medsiglip_jax.serve.errors import RequestError, wrong_field
from medsiglip_jax.serve.fields import Fields
from medsiglip_jax.serve.http import answering, endpoint, unless_gone
from medsiglip_jax.serve.instances import Reading, Text
from medsiglip_jax.serve.openapi import (
    INTEGER,
    NUMBER,
    STRING,
    Described,
    Operation,
    array,
    obj,
    optional,
)
from medsiglip_jax.serve.service import Service, embed_all, unit
from medsiglip_jax.serve.state import State

_MOST = 1000
_ROW = re.compile(r"[0-9]{1,18}")  # Starlette's own numbers may have so many digits that int fails
_QUERIES = ("text", "image", "row")


def routes(state: State) -> Sequence[Described]:
    """/v1/search and /v1/thumbnails, if the server was given a run."""
    corpus = state.corpus
    if corpus is None:
        return []

    async def search(service: Service, document: Any, request: Request) -> Any:
        fields = Fields(document)
        fields.only(*_QUERIES, "top_k")
        k = fields.number("top_k", 1, 12)
        if k > _MOST:
            raise wrong_field("top_k", f"expected at most {_MOST}")
        vector = await _query(service, corpus, fields)
        hits = await service.run(corpus.find, vector, k)
        return {"hits": [{**hit, "thumbnail": f"/v1/thumbnails/{hit['row']}"} for hit in hits]}

    async def thumbnail(request: Request) -> Response:
        row, content = request.path_params["row"], None
        if _ROW.fullmatch(row):
            drawing = state.current().run(corpus.thumbnail, int(row))
            try:
                with contextlib.suppress(IndexError):
                    content = await unless_gone(request, drawing)
            except OSError:
                problem = "the picture cannot be read: its disk or network fails"
                raise RequestError(503, problem, {"Retry-After": "5"}) from None
        if content is None:
            raise RequestError(404, "no picture of this row")
        headers = {"X-Content-Type-Options": "nosniff"}
        return Response(content, media_type="image/png", headers=headers)

    return [
        Described("/v1/search", endpoint(state, search, failed), _SEARCH),
        Described("/v1/thumbnails/{row}", answering(thumbnail, failed), _THUMBNAIL),
    ]


async def _query(service: Service, corpus: Corpus, fields: Fields) -> np.ndarray:
    """The vector that is searched for: of a text, of an image, or of a row of the run."""
    given = [name for name in _QUERIES if name in fields]
    if len(given) != 1:
        raise RequestError(400, f"expected exactly one of {', '.join(_QUERIES)}")
    if given == ["row"]:
        try:
            return await service.run(corpus.vector, fields.number("row", 0))
        except IndexError:
            raise wrong_field("row", "there is no such row") from None
    if given == ["text"]:
        query = Text(fields.get("text", str))
    else:
        reading = Reading(corpus.preset, service.bounded(corpus.rules))
        query = image(fields.value("image"), "image", reading)
    return unit(await embed_all(service, {given[0]: query}))[0]


_SEARCH = Operation(
    "The images of the server's embeddings that are most similar to a text, an image or a row",
    body=obj({}, {"text": STRING, "image": IMAGE, "row": INTEGER, "top_k": INTEGER}),
    example={"text": "a chest X-ray", "top_k": 3},
    answer=obj({"hits": array(obj({
        "row": INTEGER, "id": STRING, "source": STRING, "score": NUMBER,
        "thumbnail": optional(STRING),
    }))}),
    error=NATIVE_ERROR,
)  # fmt: skip
_THUMBNAIL = Operation(
    "A small PNG of a row", error=NATIVE_ERROR, parameters={"row": "0"}, media="image/png"
)
