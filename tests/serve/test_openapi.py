"""/openapi.json against the routes that there are, and its examples against the server."""

import re

import pytest
from starlette.routing import Route

from medsiglip_jax.serve import app, openapi
from medsiglip_jax.serve.settings import Settings
from medsiglip_jax.serve.state import State


@pytest.fixture(scope="module")
def document(client) -> dict:
    return client.get("/openapi.json").body


def operations(document):
    """(path with the examples of its parameters, method, operation)."""
    for path, item in document["paths"].items():
        for method, operation in item.items():
            examples = {p["name"]: p["example"] for p in operation.get("parameters", ())}
            yield path.format(**examples), method, operation


def test_every_route_is_in_it_and_says_what_it_is(document):
    built = app.build(State(Settings(), "tiny"))
    routes = [route for route in built.routes if isinstance(route, Route)]
    paths = {re.sub(r":\w+}", "}", route.path) for route in routes}
    assert set(document["paths"]) == paths and len(paths) > 20
    assert all(isinstance(route, openapi.Described) for route in routes)


def test_its_structure(document):
    assert document["openapi"].startswith("3.1.") and set(document["info"]) == {"title", "version"}
    names = [operation["operationId"] for _, _, operation in operations(document)]
    assert len(set(names)) == len(names)
    for path, item in document["paths"].items():
        for method, operation in item.items():
            parameters = operation.get("parameters", ())
            assert re.findall(r"{(\w+)}", path) == [p["name"] for p in parameters]
            assert operation["summary"] and "default" in operation["responses"]
            assert ("requestBody" in operation) == (method == "post")


def fits(value, schema) -> bool:
    """Whether a value has the form of a schema, as far as this document goes."""
    if "anyOf" in schema:
        return any(fits(value, one) for one in schema["anyOf"])
    if "const" in schema or "enum" in schema:
        return value in schema.get("enum", [schema.get("const")])
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool,
             "number": (int, float), "null": type(None)}  # fmt: skip
    if "type" in schema and not isinstance(value, kinds[schema["type"]]):
        return False
    if isinstance(value, list):
        return all(fits(one, schema.get("items", {})) for one in value)
    if isinstance(value, dict):
        known = schema.get("properties", {})
        required = set(schema.get("required", ())) <= set(value)
        return required and all(fits(v, known.get(k, {})) for k, v in value.items())
    return True


def test_its_examples_are_answered_as_it_says(client, document):
    for path, method, operation in operations(document):
        if method == "post":
            body = operation["requestBody"]["content"]["application/json"]
            assert fits(body["example"], body["schema"]), path
            answer = client.post(path, body["example"])
        else:
            answer = client.get(path)
        said = operation["responses"].get(str(answer.status))
        assert said is not None, (path, answer)
        form = said.get("content", {}).get("application/json", {}).get("schema")
        assert form is None or fits(answer.body, form), (path, answer.body)


def test_errors_have_the_form_that_it_says(client, document):
    for path, method, operation in operations(document):
        if method != "post":
            continue
        answer = client.post(path, b"{")
        form = operation["responses"]["default"]["content"]["application/json"]["schema"]
        assert answer.status == 400 and fits(answer.body, form), path


def test_keys_are_in_it_where_they_are_needed():
    state = State(Settings(api_keys=frozenset(["0123456789abcdef"])), "tiny")
    assert openapi.document(state, [])["security"] == [{"key": []}]
    assert "security" not in openapi.document(State(Settings(), "tiny"), [])
