"""The page /ui: it stands alone, nothing in it can become markup, and its headers let it run."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from html import escape
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from medsiglip_jax.pages import charts, html
from medsiglip_jax.serve.page import headers, page

ROOT = Path(__file__).parents[2]
TEXT = page().decode()
INPUTS = ("input", "select", "textarea")


class Elements(HTMLParser):
    """Tags with their attributes, and what stands in scripts and styles."""

    def __init__(self):
        super().__init__()
        self.found, self.contents, self.labelled = [], {}, set()
        self._open = []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.found.append((tag, attributes))
        if tag in INPUTS and "label" in self._open:
            self.labelled.add(attributes["id"])
        if tag == "label" and "for" in attributes:
            self.labelled.add(attributes["for"])
        self._open.append(tag)

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        if self.lasttag in ("script", "style") and data.strip():
            assert self.lasttag not in self.contents
            self.contents[self.lasttag] = data


@pytest.fixture(scope="module")
def elements():
    parser = Elements()
    parser.feed(TEXT)
    return parser


def policy():
    directives = (line.split(" ", 1) for line in headers()["Content-Security-Policy"].split("; "))
    return {name: value for name, value in directives}


def test_the_page_is_small():
    lines = TEXT.splitlines()
    assert len(lines) <= 300 and max(map(len, lines)) <= 100


def test_the_page_needs_nothing_else(elements):
    for tag, attributes in elements.found:
        assert not {"src", "action", "style"} & set(attributes)
        assert not [name for name in attributes if name.startswith("on")]
        if "href" in attributes:
            assert (tag, attributes["href"]) == ("link", "data:,")
    assert not re.search(r"https?:|url\(|@import|import\(|\bsrcdoc\b", TEXT)


@pytest.mark.parametrize(
    "name",
    "innerHTML outerHTML insertAdjacentHTML document.write createContextualFragment DOMParser eval "
    "Function( setAttribute localStorage sessionStorage document.cookie".split(),
)
def test_nothing_becomes_markup_or_is_kept(name):
    assert name not in TEXT


def test_the_policy_names_the_one_script_and_the_one_style(elements):
    tags = [tag for tag, _ in elements.found]
    for tag in ("script", "style"):
        digest = hashlib.sha256(elements.contents[tag].encode()).digest()
        assert tags.count(tag) == 1
        assert policy()[f"{tag}-src"] == f"'sha256-{base64.b64encode(digest).decode()}'"


def test_the_policy_allows_nothing_but_what_the_page_does():
    allowed = {name: value for name, value in policy().items() if value != "'none'"}
    assert set(allowed) == {
        "script-src", "style-src", "img-src", "connect-src", "require-trusted-types-for",
    }  # fmt: skip
    assert allowed["img-src"] == "blob: data:" and allowed["connect-src"] == "'self'"
    assert {"default-src", "base-uri", "form-action", "frame-ancestors"} <= set(policy())
    assert headers()["X-Content-Type-Options"] == "nosniff"
    assert headers()["Referrer-Policy"] == "no-referrer"


def test_the_script_asks_for_elements_that_are_there(elements):
    ids = [attributes["id"] for _, attributes in elements.found if "id" in attributes]
    asked = set(re.findall(r"""(?:\$|tell)\("([^"]+)\"""", elements.contents["script"]))
    assert len(ids) == len(set(ids)) and len(asked) > 10 and asked <= set(ids)


def test_every_input_has_a_label(elements):
    inputs = {attributes["id"] for tag, attributes in elements.found if tag in INPUTS}
    assert len(inputs) > 4 and inputs == elements.labelled


def test_the_page_has_the_colours_of_the_others():
    others = " ".join([html.PAPER, html.GREY, html._STYLE, html._NIGHT, *charts.COLOURS, "#ffffff"])
    used, known = (set(re.findall(r"#[0-9a-f]{6}\b", text)) for text in (TEXT, others))
    assert len(used) > 8 and used <= known


def test_the_page_says_what_it_is_not():
    assert "Not a medical device." in TEXT.split("<footer>")[1]


def test_a_wheel_holds_the_page(tmp_path):
    pytest.importorskip("hatchling")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read("medsiglip_jax/serve/ui.html") == page()


INFO = {"model": "<img src=x>", "version": "1", "probes": ["<b>"], "search": True, "image_size": 8}


class Server(BaseHTTPRequestHandler):
    """The page with its headers, and what it asks for first."""

    def do_GET(self):
        json_type = {"Content-Type": "application/json"}
        answers = {"/ui": (headers(), page()), "/v1/info": (json_type, json.dumps(INFO).encode())}
        sent, body = answers[self.path]
        self.send_response(200)
        for name, value in {**sent, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def test_a_browser_runs_the_page_and_shows_names_as_text(tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("neither chromium nor google-chrome is installed")
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        command = [
            browser, "--headless=new", "--no-sandbox", "--disable-gpu",
            f"--user-data-dir={tmp_path}", "--virtual-time-budget=5000",
            "--dump-dom", f"http://127.0.0.1:{server.server_port}/ui",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        server.shutdown()
    assert f"{escape(INFO['model'])}, medsiglip-jax 1</p>" in done.stdout, done.stderr[-2000:]
    assert "<option>&lt;b&gt;</option>" in done.stdout and "<img" not in done.stdout
    assert '<body class="searchable">' in done.stdout
