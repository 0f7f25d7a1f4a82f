"""DICOMweb: studies and series of a server give what the same files give on disk."""

import functools
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pyarrow.parquet as pq
import pytest
from dicom_files import made

from medsiglip_jax.data import inputs
from medsiglip_jax.data.dicomweb import instances
from medsiglip_jax.files import dicomweb, google, limits, places
from medsiglip_jax.preprocess import bytes as content
from medsiglip_jax.preprocess import sources
from medsiglip_jax.preprocess.parts import Parts

pytest.importorskip("aiohttp")

STUDY, ONE, TWO = "1.2.3", "1.2.3.4", "1.2.3.5"
TOKEN = "token-of-nobody"


def slices():
    """(series, UID, number) -> a file: five slices of a CT in any order, and two other images."""
    rng, found = np.random.default_rng(0), {}
    for series, count, modality in ((ONE, 5, "CT"), (TWO, 2, "CR")):
        for number in rng.permutation(count).tolist():
            uid = f"{series}.{7 * number % 11}"
            place = dict(
                ImagePositionPatient=[0, 0, 2.5 * number],
                ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
            )
            found[series, uid, number + 1] = made(
                rng.integers(0, 900, (20, 24)).astype(np.uint16), Modality=modality,
                StudyInstanceUID=STUDY, SeriesInstanceUID=series, SOPInstanceUID=uid,
                InstanceNumber=number + 1, **(place if modality == "CT" else {}),
            )  # fmt: skip
    return found


class Server:
    """Answers QIDO-RS and WADO-RS; what was asked is in `heads`.

    Attributes:
        multipart: whether files are sent in multipart, as Orthanc and dcm4chee send them.
        most: instances that one answer lists, whatever is asked for.
        answer: (handler) -> whether it has answered in another way.
    """

    def __init__(self, files, multipart=False, most=2, answer=lambda handler: False):
        self.files, self.multipart, self.most, self.answer = files, multipart, most, answer
        self.heads, self.address = [], ""

    def respond(self, handler):
        self.heads.append((handler.path, dict(handler.headers)))
        if self.answer(handler):
            return
        path = urlsplit(handler.path)
        _, study, *rest = path.path.split("/")[2:]
        found = {k: v for k, v in self.files.items() if "series" not in rest or k[0] == rest[1]}
        if rest[-1] == "instances":
            return self.list(handler, found, parse_qs(path.query))
        uid = rest[-1]
        data = next((v for k, v in found.items() if k[1] == uid), None)
        if study != STUDY or data is None:
            return send(handler, 404)
        if not self.multipart:
            return send(handler, 200, data, "application/dicom")
        head = b"--of parts\r\nContent-Type: application/dicom\r\n\r\n"
        send(handler, 200, head + data + b"\r\n--of parts--\r\n", "multipart/related")

    def list(self, handler, found, query):
        start = int(query.get("offset", ["0"])[0])
        rows = [
            {"0020000E": {"vr": "UI", "Value": [series]}, "00080018": {"vr": "UI", "Value": [uid]},
             "00200013": {"vr": "IS", "Value": [number]}}
            for series, uid, number in found
        ][start : start + self.most]  # fmt: skip
        data = json.dumps(rows).encode()
        send(handler, 200 if rows else 204, data if rows else b"", "application/dicom+json")


def send(handler, status, data=b"", kind="text/plain", **headers):
    handler.send_response(status)
    for name, value in {"Content-Type": kind, "Content-Length": len(data), **headers}.items():
        handler.send_header(name, str(value))
    handler.end_headers()
    handler.wfile.write(data)


@contextmanager
def running(server: Server) -> Iterator[str]:
    """The address of its study."""

    class Handler(BaseHTTPRequestHandler):
        do_GET = lambda self: server.respond(self)  # noqa: E731
        log_message = lambda *_: None  # noqa: E731

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        server.address = f"http://127.0.0.1:{listening.server_port}/dicomWeb"
        try:
            yield f"{server.address}/studies/{STUDY}"
        finally:
            listening.shutdown()


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    monkeypatch.setattr(content, "_PAUSES", (0.0,))
    for name in (dicomweb.SERVER, dicomweb.TOKEN, dicomweb.TOKEN_FILE):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("multipart", [False, True])
@pytest.mark.filterwarnings("default")
def test_a_study_gives_the_vectors_of_its_files(run, checkpoint, tmp_path, multipart):
    """Whole, and one slice of each series, with the ids of its instances below the study."""
    files = slices()
    for (series, uid, _), data in files.items():
        path = tmp_path / "disk" / "series" / series / "instances" / uid
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    with running(Server(files, multipart)) as study:
        for flags in ([], ["--series", "--frame", "all"]):
            rows = []
            for given in (tmp_path / "disk", study):
                out = tmp_path / f"out{len(flags)}{str(given)[:4].strip('/')}"
                code, _, err = run("embed", "--model", checkpoint, "--output", out, given, *flags)
                assert code == 0, err
                rows.append(pq.read_table(out / "part-00000.parquet"))
            disk, web = (table.sort_by("id").to_pydict() for table in rows)
            assert web["id"] == disk["id"] and len(web["id"]) == 7
            assert web["embedding"] == disk["embedding"]
            assert all(source.startswith(f"{study}/series/") for source in web["source"])


def test_instances_come_by_series_and_number():
    files = slices()
    wanted = [f"{s}/instances/{uid}" for s, _, uid in sorted((s, n, u) for s, u, n in files)]
    with running(Server(files)) as study:
        found = instances(study)
        assert found == [f"{study}/series/{name}" for name in wanted]
        assert instances(f"{study}/series/{TWO}/") == found[5:]
        assert instances(found[0]) == [found[0]]
        rows = list(inputs.rows([f"{study}/series/{TWO}"]))
        assert [row.id for row in rows] == [name.partition("/")[2] for name in wanted[5:]]
        (row,) = inputs.rows([found[0]])
        assert (row.id, row.source) == (found[0].rpartition("/")[2], found[0])
    with running(Server(files, most=1000)) as study:
        assert len(instances(study)) == 7
    assert dicomweb.over_https(f"dicomweb://h/x/studies/{STUDY}") == f"https://h/x/studies/{STUDY}"
    assert dicomweb.study(f"dicomweb://h/x/studies/{STUDY}") == f"https://h/x/studies/{STUDY}/"


def test_series_are_sorted_as_on_disk():
    with running(Server(slices(), multipart=True)) as study:
        rows = inputs.rows([f"{study}/series/{ONE}"], parts=Parts("all", series=True))
        positions = [sources.planes(row.source)[0].position[2] for row in rows]
    assert positions == sorted(positions) and len(positions) == 5


def wants_token(handler):
    if handler.headers.get("Authorization") == f"Bearer {TOKEN}":
        return False
    send(handler, 401)
    return True


def test_a_token_goes_to_its_server_only_and_is_shown_nowhere(tmp_path, monkeypatch):
    files = slices()
    server, other = Server(files, answer=wants_token), Server(files)
    with running(server) as study, running(other) as elsewhere:
        with pytest.raises(
            ValueError, match="401 .*set MEDSIGLIP_JAX_DICOMWEB_TOKEN or"
        ) as refused:
            instances(study)
        assert "\n" not in str(refused.value)
        (tmp_path / "token").write_text(f"{TOKEN}\n")
        for name, value in (
            (dicomweb.TOKEN, TOKEN),
            (dicomweb.TOKEN_FILE, str(tmp_path / "token")),
        ):
            with monkeypatch.context() as patched:
                patched.setenv(name, value)
                for asked in (instances, sources.read):
                    with pytest.raises(ValueError, match="^MEDSIGLIP_.*SERVER has to be") as wrong:
                        asked(f"{study}/series/{ONE}/instances/1" if asked != instances else study)
                    assert TOKEN not in str(wrong.value)
                patched.setenv(dicomweb.SERVER, server.address)
                rows = inputs.rows([study])
                assert len(rows) == 7 and TOKEN not in str(rows.table)
                assert content.read_bytes(rows[0].source)[128:132] == b"DICM"
                content.read_bytes(instances(elsewhere)[0])
        assert not any("Authorization" in head for _, head in other.heads)

        def leave(handler):
            place = f"http://localhost:{other.address[17:]}{handler.path[9:]}"
            send(handler, 302, Location=place)
            return True

        monkeypatch.setenv(dicomweb.SERVER, server.address)
        monkeypatch.setenv(dicomweb.TOKEN, TOKEN)
        server.answer = leave
        instances(study)
        assert not any("Authorization" in head for _, head in other.heads)


def test_the_credentials_of_google_go_to_google(monkeypatch):
    class Credentials:
        def headers(self):
            return {"authorization": f"Bearer {TOKEN}"}

    monkeypatch.setattr(dicomweb, "_google", Credentials)
    study = "healthcare.googleapis.com/v1/projects/p/locations/l/datasets/d/dicomStores/s/dicomWeb"
    address = f"https://{study}/studies/{STUDY}/series/{ONE}/instances/1"
    assert dicomweb.headers(address)["authorization"] == f"Bearer {TOKEN}"
    assert "authorization" not in dicomweb.headers(address.replace("https", "http"))
    assert "authorization" not in dicomweb.headers(address.replace(".com", ".com.evil.example"))

    def expired():
        raise google.Expired("x")

    monkeypatch.setattr(Credentials, "headers", lambda self: expired())
    assert set(dicomweb.headers(address)) == {"Accept"}
    assert "gcloud" in dicomweb.advice(address)


def test_credentials_that_google_has_not_are_looked_for_once(monkeypatch):
    auth = pytest.importorskip("google.auth")
    asked = []

    def default(**_):
        asked.append(1)
        raise auth.exceptions.DefaultCredentialsError("none")

    monkeypatch.setattr(auth, "default", default)
    monkeypatch.setattr(dicomweb, "_google", functools.cache(dicomweb._google.__wrapped__))
    study = "https://healthcare.googleapis.com/v1/dicomWeb/studies/1/series/2/instances/"
    found = [dicomweb.headers(f"{study}{number}") for number in range(5)]
    assert len(asked) == 1 and all(set(headers) == {"Accept"} for headers in found)


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (b"<html>", "no list of instances"), (b"{}", "no instances"), (b"[1]", "no list of inst"),
        (b'[{"00080018": {"Value": ["../../x"]}}]', "no list of instances"),
        (b'[{"0020000E": {"Value": [1.5]}, "00080018": {"Value": [[]]}}]', "no list of instances"),
        (b"[" * 4000, "no list of instances"), (b"", "no instances"),
        (b"[" + b" " * 5000 + b"]", "more than 4,096 bytes"),
    ],
)  # fmt: skip
def test_a_server_that_answers_otherwise_is_said_in_a_line(sent, said):
    server = Server({}, answer=lambda handler: send(handler, 200, sent) or True)
    with running(server) as study, limits.use(limits.parse(None, 4096, 5.0)):
        with pytest.raises(ValueError, match=said) as error:
            instances(study)
    assert "\n" not in str(error.value) and str(error.value).startswith(study)


def test_a_multipart_answer_is_taken_apart():
    data = bytes(128) + b"DICM" + b"\r\n--x\r\nno end"
    part = b"--x\r\nContent-Type: application/dicom\r\nContent-Location: a\r\n\r\n" + data
    assert dicomweb.unpacked(part + b"\r\n--x--\r\n") == data
    assert dicomweb.unpacked(part + b"\r\n--x--") == data
    own = b"--" + bytes(126) + b"DICM--\r\n\r\n"
    for whole in (data, own, b"--cut", b"", b"--x\r\nno head", part[:40]):
        assert dicomweb.unpacked(whole) == whole


@pytest.mark.parametrize(
    "address",
    ["https://h/dicomWeb/studies", "https://h/studies/1/../2", "https://h/studies/1?x=2",
     "studies/1", "https://h/studies/1/series", "https://h/x/studies/a", "gs://b/studies/1", "ftp://h/studies/1"],
)  # fmt: skip
def test_other_addresses_are_none_of_dicomweb(address):
    assert not dicomweb.is_address(address) and not dicomweb.headers(address)
    assert not places.at("studies/1/series/2").exists()  # a folder of such a name stays a folder
