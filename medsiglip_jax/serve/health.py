"""Whether the server lives and takes requests, and its numbers; none of it waits for the device."""

from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from medsiglip_jax.serve.openapi import Described, Operation
from medsiglip_jax.serve.state import State

LIVE, READY, METRICS = "/health/live", "/health/ready", "/metrics"
_LIVE = Operation("Whether it lives: 503 asks for a restart", probe=True)
_READY = Operation("Whether new requests should come here: 503 if not", probe=True)


def routes(state: State) -> Sequence[Described]:
    """Liveness, readiness, the official container's health, and /metrics."""

    async def live(request: Request) -> Response:
        return _status(state.alive)

    async def ready(request: Request) -> Response:
        return _status(state.ready)

    async def metrics(request: Request) -> Response:
        measures = state.measures
        return Response(measures.text_format(), media_type=measures.media_type)

    return [
        Described(LIVE, live, _LIVE),
        Described(READY, ready, _READY),
        Described(state.settings.health_route, ready, _READY),
        Described(METRICS, metrics, Operation("Numbers for Prometheus", open=True)),
    ]


def _status(well: bool) -> Response:
    return PlainTextResponse("ok" if well else "not ok", 200 if well else 503)
