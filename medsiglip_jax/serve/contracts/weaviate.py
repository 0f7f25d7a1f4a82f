"""What Weaviate's module multi2vec-clip asks of its inference container.

Written for the requests of weaviate 1.24 (modules/multi2vec-clip/clients): images are base64, lists
may be null, and an error is a string. The contract has no error of a single instance: one that is
wrong is a 400 that names it. Vectors are normalised.
"""

from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from medsiglip_jax.serve.contracts import native
from medsiglip_jax.serve.fields import Fields
from medsiglip_jax.serve.http import endpoint, getter
from medsiglip_jax.serve.instances import Instance, Text, picture
from medsiglip_jax.serve.openapi import ONE_PIXEL, STRING, VECTOR, Described, Operation, array, obj
from medsiglip_jax.serve.service import Service, embed_all, unit
from medsiglip_jax.serve.state import State


def routes(state: State) -> Sequence[Described]:
    """/vectorize, /meta, and whether it lives and is ready."""

    async def vectorize(service: Service, document: Any, request: Request) -> Any:
        fields = Fields(document)
        texts = fields.items("texts", str) if "texts" in fields else []
        images = fields.items("images", str) if "images" in fields else []
        given: dict[str, Instance] = {f"texts[{i}]": Text(text) for i, text in enumerate(texts)}
        for i, image in enumerate(images):
            given[f"images[{i}]"] = picture(image, f"images[{i}]")
        vectors = [vector.tolist() for vector in unit(await embed_all(service, given))]
        return {"textVectors": vectors[: len(texts)], "imageVectors": vectors[len(texts) :]}

    async def live(request: Request) -> Response:
        return Response(status_code=204 if state.alive else 503)

    async def ready(request: Request) -> Response:
        return Response(status_code=204 if state.ready else 503)

    return [
        Described("/vectorize", endpoint(state, vectorize), _VECTORIZE),
        Described("/meta", getter(lambda _: native.describe(state)), _META),
        Described("/.well-known/live", live, _LIVE),
        Described("/.well-known/ready", ready, _READY),
    ]


_LIVE = Operation("Whether it lives", status=204, probe=True)
_READY = Operation("Whether it is ready", status=204, probe=True)
_META = Operation("What the model is", obj({"model": STRING, "version": STRING}))
_VECTORIZE = Operation(
    "Normalised embeddings of texts and of images, which are base64",
    body=obj({}, {"texts": array(STRING), "images": array(STRING)}),
    example={"texts": ["a chest x-ray"], "images": [ONE_PIXEL]},
    answer=obj({"textVectors": array(VECTOR), "imageVectors": array(VECTOR)}),
)
