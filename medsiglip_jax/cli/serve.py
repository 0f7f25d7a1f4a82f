"""serve: embeddings and scores over HTTP."""

import argparse
import os
import re
import ssl
import sys
from pathlib import PurePath
from typing import Any

from medsiglip_jax.cli import abstaining, loading, reading
from medsiglip_jax.cli.output import note, show
from medsiglip_jax.cli.parser import REPEATED, Parser, add_flags

_SIZE = re.compile(r"(\d+)\s*(|B|[kKMG]i?B?)")
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
_FLAGS = {
    "--name N": "name of the model in requests and answers; default the last part of M",
    "--host A": "address to listen on, default %(default)s; 0.0.0.0 for all",
    "--port N": "default %(default)s; on Vertex AI AIP_HTTP_PORT",
    "--certfile F": "certificate chain of TLS, PEM",
    "--keyfile F": "its private key",
    "--api-key-file F": "file of keys, one per line; requests need one of them as "
    "Authorization: Bearer KEY",
    "--cors-origin O": "origin whose pages may ask, such as https://example.org; repeatable",
    "--log-requests": "for an audit trail, write hash, size, model and version of each request",
    "--drain-delay SECONDS": "time between not ready and a closed socket on SIGTERM, default "
    "%(default)s",
}
_LOAD = {
    "--max-batch N": "the most rows of a batch, a power of two, default %(default)s",
    "--max-wait-ms T": "how long a batch waits for rows that are being read, default %(default)s",
    "--queue N": "images, patches and texts that are accepted at a time, default %(default)s; "
    "more are answered with 429, and more in one request with 413",
    "--max-body SIZE": "largest body of a request, default %(default)s",
}
_ADDRESSES = {
    "--allow-host H": "host that images are fetched from, such as pacs.example.org:8042 or "
    "*.example.org; repeatable; by default no address is fetched",
    "--allow-prefix P": "start of addresses in buckets (gs://…) and DICOM stores that the "
    "server reads with its own credentials; repeatable",
    "--allow-private": "allowed hosts may have private addresses",
}
_DATA = {
    "--probe P.npz": "file of probe fit, which /v1/classify then has by its name; repeatable",
    "--embeddings DIR": "output of embed by this model, which /v1/search and /ui search",
}


def define_flags(sub: Parser) -> None:
    from medsiglip_jax.serve.settings import MAX_PIXELS

    loading.add_model(sub, required=False, batches=False)
    values: dict[str, Any] = {"host": "127.0.0.1", "port": 8080, "drain_delay": 5.0}
    add_flags(sub, _FLAGS, cors_origin=REPEATED, **values)
    limits = sub.add_argument_group("load")
    add_flags(limits, _LOAD, max_batch=64, max_wait_ms=5.0, queue=256, max_body="32MiB")
    loading.add_workers(limits)
    addresses = sub.add_argument_group("addresses in requests")
    add_flags(addresses, _ADDRESSES, allow_host=REPEATED, allow_prefix=REPEATED)
    add_flags(sub, _DATA, probe=REPEATED)
    abstaining.add_abstention(sub, unsure=True)
    reading.add_preprocess(sub)
    reading.add_dicom(sub, max_pixels=MAX_PIXELS)


def serve(args: argparse.Namespace) -> int:
    """Serve embeddings and scores over HTTP, on all devices of this machine. One server speaks
    the contracts of Vertex AI's MedSigLIP container, OpenAI, Hugging Face, KServe v2
    and Weaviate, and has /v1/classify of its own; /openapi.json describes them. HTTP/1.1
    only, no gRPC. It listens at once and answers once the model is loaded
    (/health/ready); SIGTERM drains it.

    example:
      medsiglip-jax serve --model google/medsiglip-448 --port 8080
      medsiglip-jax serve --model M --host 0.0.0.0 --api-key-file keys.txt
      medsiglip-jax serve --model M --probe findings.npz --allow-host images.example.org
    """
    args.model = args.model or os.environ.get("AIP_STORAGE_URI")  # as Vertex AI says it
    if args.model is None:
        raise ValueError("expected --model M, or AIP_STORAGE_URI in the environment")
    try:
        from medsiglip_jax.serve import logs, run
    except ModuleNotFoundError as error:
        install = "pip install 'medsiglip-jax[serve]'"
        raise ModuleNotFoundError(f"serve needs {error.name}: {install}") from None

    settings = _settings(args)
    known = abstaining.known_images(args)
    probes, corpus, tls = _probes(args.probe or ()), _corpus(args), _tls(args)
    logs.to_stderr()
    server: run.Server

    def ready() -> None:
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        scheme = "https" if args.certfile else "http"
        address = f"{scheme}://{host}:{server.port}"
        show({"address": address, "model": args.model}, args.json, lambda r: f"ready: {address}")
        sys.stdout.flush()  # to a pipe, too: whoever starts the server waits for this line

    def load():
        model = loading.load(args, loading.local_mesh())
        reading.prepared(args, settings.rules, model.config)  # says what is unlike its training
        return model

    name = args.name or _name(args.model)
    server = run.Server(
        settings, name, load, probes, corpus,
        _fetcher(settings), tls, ready, known, abstaining.limits(args, known),
    )  # fmt: skip
    note(f"loading {args.model}; listening on {settings.host}, port {server.port}")
    if known is not None:
        note("/v1/classify has no answer for images unlike --reference; other routes answer all")
    server.run()
    if server.is_loading and server.signal:
        note("stopped while the model was being loaded")
        os._exit(128 + server.signal)  # Python would end beneath the compiler, which then aborts
    note("stopped; all requests that were accepted have been answered")
    return 0


def _settings(args: argparse.Namespace):
    import dataclasses

    from medsiglip_jax.files import threads
    from medsiglip_jax.serve import settings

    rules = reading.dicom_rules(args)
    if args.max_pixels is None:
        rules = dataclasses.replace(rules, max_pixels=settings.MAX_PIXELS)
    keys = settings.read_keys(args.api_key_file) if args.api_key_file else frozenset()
    given = settings.Settings(
        host=args.host, port=args.port, max_batch=args.max_batch, max_wait_ms=args.max_wait_ms,
        queue=args.queue, max_body=_bytes(args.max_body), preprocess=args.preprocess, rules=rules,
        asked=frozenset(reading.asked(args)),
        api_keys=keys, allow_hosts=tuple(args.allow_host or ()),
        allow_prefixes=tuple(args.allow_prefix or ()), allow_private=args.allow_private,
        drain_delay=args.drain_delay, cors_origins=tuple(args.cors_origin or ()),
        log_requests=args.log_requests, workers=threads.workers(),
    )  # fmt: skip
    return settings.on_vertex(given, os.environ)


def _bytes(text: str) -> int:
    """A size such as 32MiB; k, M and G are powers of 1,024."""
    if not (parsed := _SIZE.fullmatch(text.strip())):
        raise ValueError(f"--max-body is {text!r}; expected a size such as 32MiB")
    return int(parsed[1]) * _UNITS[parsed[2][:1].lower().replace("b", "")]


def _probes(paths):
    """The probes by the names of their files."""
    from medsiglip_jax.embeddings.probe.linear import open_probe

    names = [PurePath(path).stem for path in paths]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"--probe: several are named {', '.join(sorted(twice))}; rename one")
    return {name: open_probe(path) for name, path in zip(names, paths, strict=True)}


def _corpus(args: argparse.Namespace):
    from medsiglip_jax.serve.corpus import Corpus

    return Corpus(args.embeddings) if args.embeddings else None


def _fetcher(settings):
    """What reads addresses; None if none are allowed."""
    if not (settings.allow_hosts or settings.allow_prefixes):
        return None
    from medsiglip_jax.serve.addresses import AllowList
    from medsiglip_jax.serve.fetching import Fetcher

    allowed = AllowList(settings.allow_hosts, settings.allow_prefixes, settings.allow_private)
    return Fetcher(allowed, max_bytes=settings.max_body, seconds=settings.fetch_seconds)


def _name(model: str) -> str:
    """What requests call the model: a repository, or the name of its folder or file."""
    is_repository = "://" not in model and not os.path.exists(model)
    return model if is_repository else PurePath(os.path.abspath(model.rstrip("/"))).name


def _tls(args: argparse.Namespace) -> tuple[str, str] | None:
    if bool(args.certfile) != bool(args.keyfile):
        raise ValueError("--certfile and --keyfile belong together")
    if not args.certfile:
        return None
    for path in (args.certfile, args.keyfile):
        with open(path, "rb"):  # whose error names it
            pass
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(args.certfile, args.keyfile)
    except ssl.SSLError:
        both = f"--certfile {args.certfile}, --keyfile {args.keyfile}"
        raise ValueError(f"{both}: expected a chain of certificates and its key, PEM") from None
    return args.certfile, args.keyfile
