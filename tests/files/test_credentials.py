"""Addresses as they are shown: without user names, passwords and queries."""

import pyarrow as pa
import pytest

from medsiglip_jax.data.rows import without_credentials
from medsiglip_jax.files import credentials

SHOWN = {
    "https://user:pw@host/a.png?X-Amz-Signature=5f&b=2": "https://host/a.png",
    "https://host/a.png?sig=5f#frame=3": "https://host/a.png#frame=3",
    "https://host/a.tar?sig=5f#512:1024": "https://host/a.tar#512:1024",
    "https://host/t.parquet?sig=a b#row=3,image": "https://host/t.parquet#row=3,image",
    "HTTP://user@host:80/a?x": "HTTP://host:80/a",
    "http://u:p@ss/w@host/a": "http://ss/w@host/a",  # a slash ends the host, also for servers
    "http://user:p@ss@host/a@b?c?d#e?f": "http://host/a@b",
    "ftp://user:pw@host/a?b": "ftp://host/a?b",  # only http(s) has queries
    "gs://bucket/is it?.png": "gs://bucket/is it?.png",
    "gs://bucket/a@b.png": "gs://bucket/a@b.png",
    "/local/what?.png": "/local/what?.png",
    "https://host/two\nlines?a=1\n2": "https://host/two\nlines",
    "https://host/#part": "https://host/#part",
    "": "",
}


@pytest.mark.parametrize("source", SHOWN)
def test_an_address_is_shown_without_credentials(source):
    """By Python, and by Arrow for columns of addresses."""
    assert credentials.without(source) == SHOWN[source]
    column = pa.chunked_array([pa.array([source, None], pa.large_string())])
    assert without_credentials(column).to_pylist() == [SHOWN[source], None]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (
            "cannot read https://u:pw@h/a.png?sig=5f: HTTP 403",
            "cannot read https://h/a.png: HTTP 403",
        ),
        ("401, url='http://h/a?token=5f'", "401, url='http://h/a'"),
        ("{'a': \"https://h/a b.png?sig=5f\"}", "{'a': \"https://h/a b.png\"}"),
        ("http://h/a?x=1 and http://u:pw@h/b?y=2", "http://h/a and http://h/b"),
        ("http://h/a: is the network down? The same", "http://h/a: is the network down? The same"),
        ("is gs://b/a?x there, mail@host", "is gs://b/a?x there, mail@host"),
    ],
)
def test_addresses_in_a_text_are_shown_without_credentials(text, shown):
    assert credentials.without_in_text(text) == shown
