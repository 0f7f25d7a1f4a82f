"""/openapi.json: what every route takes and answers, as the routes themselves say it."""

import re
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from medsiglip_jax.serve.state import State

PATH = "/openapi.json"
Schema = Mapping[str, Any]
_PARAMETER = re.compile(r"{(\w+)(?::\w+)?}")

# A PNG of one pixel, for examples.
ONE_PIXEL = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR42mOoAAAAegB5HunP9gAAAABJRU5ErkJggg=="
)
STRING: Schema = {"type": "string"}
NUMBER: Schema = {"type": "number"}
INTEGER: Schema = {"type": "integer"}
BOOLEAN: Schema = {"type": "boolean"}


def array(items: Schema) -> Schema:
    """The schema of a list."""
    return {"type": "array", "items": items}


def optional(schema: Schema) -> Schema:
    """The schema of what may be null."""
    return {"anyOf": [schema, {"type": "null"}]}


def either(*schemas: Schema) -> Schema:
    """The schema of what has one of several forms."""
    return {"anyOf": list(schemas)}


def obj(required: Mapping[str, Schema], others: Mapping[str, Schema] | None = None) -> Schema:
    """The schema of an object."""
    fields = {**required, **(others or {})}
    return {"type": "object", "properties": fields, "required": list(required)}


VECTOR = array(NUMBER)
PLAIN_ERROR = obj({"error": STRING})


@dataclass(frozen=True)
class Operation:
    """What one route takes and answers.

    Attributes:
        summary: one line.
        answer: the schema of its JSON; None if it answers something else, or with a status of 204
            nothing.
        open: whether it is answered without a key.
        probe: whether orchestrators ask it every few seconds: it needs no key, and is not logged.
        media: the type of an answer that is not JSON.
        body: the schema of what it takes; None if it takes no body.
        example: a body that every model with two towers answers with 200.
        error: the schema of what it answers instead.
        status: of an answer that is no error.
        parameters: examples of what the path may have in its braces.
    """

    summary: str
    answer: Schema | None = None
    body: Schema | None = None
    example: Any = None
    error: Schema = field(default_factory=lambda: PLAIN_ERROR)
    status: int = 200
    parameters: Mapping[str, str] = field(default_factory=dict)
    media: str = "text/plain"
    open: bool = False
    probe: bool = False


class Described(Route):
    """A route that says what it takes and answers; it takes POST if that has a body."""

    def __init__(
        self, path: str, endpoint: Callable[[Request], Awaitable[Response]], operation: Operation
    ):
        super().__init__(path, endpoint, methods=["GET" if operation.body is None else "POST"])
        self.operation = operation


def document(state: State, routes: Iterable[Described]) -> dict[str, Any]:
    """The OpenAPI 3.1 document of a server.

    Args:
        state: of the server.
        routes: of its application.
    """
    from medsiglip_jax import __version__

    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        path = _PARAMETER.sub(r"{\1}", route.path)
        paths.setdefault(path, {}).update(_operations(route, path, state))
    made: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "medsiglip-jax", "version": __version__},
        "paths": paths,
    }
    if state.settings.api_keys:
        made["components"] = {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}}
        made["security"] = [{"key": []}]
    return made


def _operations(route: Described, path: str, state: State) -> Iterator[tuple[str, Any]]:
    operation = route.operation
    for method in sorted(route.methods or ()):
        if method == "HEAD":  # of every GET
            continue
        described: dict[str, Any] = {
            "summary": operation.summary,
            "operationId": re.sub(r"\W+", "_", f"{method.lower()}{path}").strip("_"),
            "responses": {
                str(operation.status): _answer(operation),
                "default": _json("error", operation.error),
            },
        }
        if parameters := [_parameter(name, operation, state) for name in route.param_convertors]:
            described["parameters"] = parameters
        if operation.body is not None:
            content = {"schema": operation.body, "example": operation.example}
            described["requestBody"] = {"required": True, "content": {"application/json": content}}
        yield method.lower(), described


def _answer(operation: Operation) -> dict[str, Any]:
    if operation.answer is not None:
        return _json("the answer", operation.answer)
    if operation.status == 204:
        return {"description": "no content"}
    return {"description": "the answer", "content": {operation.media: {"schema": STRING}}}


def _json(description: str, schema: Schema) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _parameter(name: str, operation: Operation, state: State) -> dict[str, Any]:
    example = operation.parameters.get(name, state.name if name == "model" else name)
    return {"name": name, "in": "path", "required": True, "schema": STRING, "example": example}
