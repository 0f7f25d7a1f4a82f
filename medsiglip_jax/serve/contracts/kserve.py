"""The Open Inference Protocol (KServe v2), in JSON: tensors in, tensors out.

The input "text" is BYTES [n]: strings. The input "image" is BYTES [n], base64 of files, data URIs
or addresses, or UINT8 [n, S, S, 3]: pixels of the model's size S, which are taken as they are. The
outputs "text_embeddings" and "image_embeddings" are FP32 [n, d], normalised. The protocol has no
error of a single element: one that is wrong is a 400 that names it. Its extension for binary
tensors is not spoken.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from medsiglip_jax.serve.errors import RequestError, wrong_field
from medsiglip_jax.serve.fields import Fields
from medsiglip_jax.serve.http import answering, endpoint, getter
from medsiglip_jax.serve.instances import Instance, Pixels, Text, picture
from medsiglip_jax.serve.openapi import (
    BOOLEAN,
    INTEGER,
    STRING,
    Described,
    Operation,
    array,
    obj,
)
from medsiglip_jax.serve.service import Service, Vector, embed_all, unit
from medsiglip_jax.serve.state import State

_OUTPUTS = {"text": "text_embeddings", "image": "image_embeddings"}
_MODEL = "/v2/models/{model:path}"
VERSION = "1"  # of the model, for those who ask for one: a server has one


def routes(state: State) -> Sequence[Described]:
    """Health, metadata, and inference."""

    async def infer(service: Service, document: Any, request: Request) -> Any:
        _check_path(state, request)
        fields = Fields(document)
        named = {"id": _id(fields)} if "id" in fields else {}
        outputs = await _outputs(service, fields)
        answer = {"model_name": state.name, "model_version": VERSION, "outputs": outputs}
        return {**named, **answer}

    async def infer_json(request: Request) -> Response:
        if "inference-header-content-length" in request.headers:
            raise RequestError(400, "binary tensors are not taken; send JSON (binary_data=False)")
        return await in_json(request)

    async def live(request: Request) -> Response:
        return JSONResponse({"live": state.alive}, 200 if state.alive else 503)

    async def ready(request: Request) -> Response:
        return JSONResponse({"ready": state.ready}, 200 if state.ready else 503)

    async def model_ready(request: Request) -> Response:
        _check_path(state, request)
        status = 200 if state.ready else 503
        return JSONResponse({"name": state.name, "ready": state.ready}, status)

    def metadata(request: Request) -> Any:
        _check_path(state, request)
        return _metadata(state, state.current())

    in_json = endpoint(state, infer)
    described: list[Described] = [
        Described("/v2/health/live", live, _LIVE),
        Described("/v2/health/ready", ready, _READY),
        Described("/v2", getter(lambda _: _server()), _SERVER),
    ]
    # The longer paths first, for the name of a model may have slashes.
    for path in (f"{_MODEL}/versions/{{version}}", _MODEL):
        described += [
            Described(f"{path}/infer", answering(infer_json), _INFER),
            Described(f"{path}/ready", answering(model_ready), _MODEL_READY),
            Described(path, getter(metadata), _METADATA),
        ]
    return described


def _check_path(state: State, request: Request) -> None:
    state.check_model(request.path_params["model"])
    if request.path_params.get("version", VERSION) != VERSION:
        raise RequestError(404, f"version: there is one, {VERSION}")


def _id(fields: Fields) -> str:
    """The name of the request, which is answered as it came."""
    name = fields.get("id", str)
    if any("\ud800" <= letter <= "\udfff" for letter in name):
        raise wrong_field("id", "it cannot be written as UTF-8: it holds a lone surrogate")
    return name


async def _outputs(service: Service, fields: Fields) -> list[Any]:
    tensors = dict(_tensors(fields))
    counts = {name: _shape(tensor)[0] for name, tensor in tensors.items()}
    wanted = _wanted(fields, [_OUTPUTS[name] for name in tensors])
    given: dict[str, Instance] = {}
    with service.queue.admitted(sum(counts.values())):
        for name, tensor in tensors.items():
            read = {"UINT8": _pixels, "BYTES": _strings}[_datatype(tensor, name)]
            given |= await service.run(read, service, tensor, name)
        vectors = iter(unit(await embed_all(service, given)))
    made = [_tensor(_OUTPUTS[name], [next(vectors) for _ in range(n)], service)
            for name, n in counts.items()]  # fmt: skip
    return [tensor for tensor in made if tensor["name"] in wanted]


def _tensors(fields: Fields) -> Iterator[tuple[str, Fields]]:
    seen = set()
    for tensor in fields.objects("inputs"):
        name = tensor.one_of("name", list(_OUTPUTS), "")
        if name in seen:
            raise wrong_field(tensor.at("name"), "there twice")
        seen.add(name)
        yield name, tensor


def _wanted(fields: Fields, made: list[str]) -> list[str]:
    if "outputs" not in fields:
        return made
    return [output.one_of("name", made, "") for output in fields.objects("outputs")]


def _tensor(name: str, vectors: list[Vector], service: Service) -> dict[str, Any]:
    values = [value for vector in vectors for value in vector.tolist()]
    shape = [len(vectors), service.model.config.embed_dim]
    return {"name": name, "datatype": "FP32", "shape": shape, "data": values}


def _datatype(tensor: Fields, name: str) -> str:
    return tensor.one_of("datatype", ("BYTES", "UINT8") if name == "image" else ("BYTES",), "")


def _shape(tensor: Fields) -> list[int]:
    shape = tensor.items("shape", int)
    if not shape or not all(0 <= size < 1 << 31 for size in shape):
        raise wrong_field(tensor.at("shape"), "expected the size of each dimension")
    return shape


def _strings(service: Service, tensor: Fields, name: str) -> dict[str, Instance]:
    """Elements of BYTES [n] or [n, 1], nested as the shape says or flat."""
    shape = _shape(tensor)
    if any(size != 1 for size in shape[1:]):  # a product of a million sizes would take minutes
        raise wrong_field(tensor.at("shape"), "expected [n]")
    flat = [value[0] if isinstance(value, list) and len(value) == 1 else value
            for value in tensor.get("data", list)]  # fmt: skip
    if len(flat) != shape[0]:
        raise wrong_field(tensor.at("data"), f"{len(flat)} elements; the shape says {shape[0]}")
    instances: dict[str, Instance] = {}
    for i, value in enumerate(Fields({"data": flat}, tensor.where).items("data", str)):
        place = f"{tensor.at('data')}[{i}]"
        instances[place] = Text(value) if name == "text" else picture(value, place)
    return instances


def _pixels(service: Service, tensor: Fields, name: str) -> dict[str, Instance]:
    if (vision := service.model.config.vision) is None:
        raise wrong_field(tensor.at("name"), "this model has no image tower")
    side = vision.image_size
    shape, where = _shape(tensor), tensor.at("data")
    if shape[1:] != [side, side, 3]:
        raise wrong_field(tensor.at("shape"), f"expected [n, {side}, {side}, 3]")
    data = tensor.get("data", list)
    if _holds_strings(data):
        raise wrong_field(where, "expected whole numbers from 0 to 255")
    try:
        values = np.asarray(data)
    except (ValueError, OverflowError):
        raise wrong_field(where, "expected numbers in the order of the shape") from None
    if values.size != math.prod(shape):
        raise wrong_field(where, f"{values.size} numbers; the shape says {math.prod(shape)}")
    if values.ndim != 1 and list(values.shape) != shape:
        raise wrong_field(where, f"nested as {list(values.shape)}; the shape says {shape}")
    if values.size and (values.dtype.kind != "i" or values.min() < 0 or values.max() > 255):
        raise wrong_field(where, "expected whole numbers from 0 to 255")
    images = values.astype(np.uint8).reshape(shape)
    return {f"{where}[{i}]": Pixels(image) for i, image in enumerate(images)}


def _holds_strings(data: list) -> bool:
    """Whether there are strings at any depth: NumPy would make every element as long as they are,
    40 GB of a string and a million numbers that fit into 12 MB."""
    while data:
        if any(isinstance(value, str) for value in data):
            return True
        data = [inner for value in data if isinstance(value, list) for inner in value]
    return False


def _server() -> Any:
    from medsiglip_jax import __version__

    return {"name": "medsiglip-jax", "version": __version__, "extensions": []}


def _metadata(state: State, service: Service) -> Any:
    config = service.model.config
    towers = [name for name in _OUTPUTS if getattr(config, {"image": "vision"}.get(name, name))]
    outputs = [{"name": _OUTPUTS[name], "datatype": "FP32", "shape": [-1, config.embed_dim]}
               for name in towers]  # fmt: skip
    inputs = [{"name": name, "datatype": "BYTES", "shape": [-1]} for name in towers]
    return {"name": state.name, "versions": [VERSION], "platform": "jax", "inputs": inputs,
            "outputs": outputs}  # fmt: skip


_TENSOR = {"name": STRING, "datatype": STRING, "shape": array(INTEGER)}
_VALUES = {**_TENSOR, "data": array({})}
_PATH = {"version": VERSION}
_LIVE = Operation(
    "Whether it is no use to wait any longer, if false", obj({"live": BOOLEAN}), probe=True
)
_READY = Operation("Whether new requests should come here", obj({"ready": BOOLEAN}), probe=True)
_SERVER = Operation(
    "Name and version", obj({"name": STRING, "version": STRING, "extensions": array(STRING)})
)
_MODEL_READY = Operation(
    "Whether the model answers", obj({"name": STRING, "ready": BOOLEAN}), parameters=_PATH
)
_METADATA = Operation(
    "The model's tensors",
    obj({"name": STRING, "versions": array(STRING), "platform": STRING,
         "inputs": array(obj(_TENSOR)), "outputs": array(obj(_TENSOR))}),
    parameters=_PATH,
)  # fmt: skip
_INFER = Operation(
    "Normalised embeddings of texts, BYTES [n], and of images, BYTES [n] or UINT8 [n, S, S, 3]",
    body=obj({"inputs": array(obj(_VALUES))},
             {"id": STRING, "outputs": array(obj({"name": STRING}))}),
    example={"inputs": [
        {"name": "text", "datatype": "BYTES", "shape": [1], "data": ["a chest x-ray"]}
    ]},
    answer=obj({"model_name": STRING, "model_version": STRING, "outputs": array(obj(_VALUES))},
               {"id": STRING}),
    parameters=_PATH,
)  # fmt: skip
