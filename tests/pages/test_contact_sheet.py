"""Contact sheets of hits."""

import numpy as np
import pytest
from PIL import Image

from medsiglip_jax.pages import contact_sheet


@pytest.fixture
def results(pictures):
    with open(pictures / "packed.tar", "wb") as file:
        file.write(b"x" * 512 + (pictures / "0.png").read_bytes())
    size = (pictures / "0.png").stat().st_size
    hits = [
        {"id": "<b>0</b>", "source": str(pictures / "0.png"), "score": 0.5},
        {"id": "packed", "source": f"{pictures}/packed.tar#512:{size}", "score": 0.25},
        {"id": "gone & away", "source": "/no/where.png", "score": 0.125},
    ]
    query = str(pictures / "1.png")
    return [{"query": "<script>alert(1)</script>", "hits": hits}, {"query": query, "hits": hits}]


def test_an_html_sheet_holds_all_it_needs(results, tmp_path):
    contact_sheet.write(tmp_path / "hits.html", results, [results[1]["query"]])
    page = (tmp_path / "hits.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 5 and page.count("<figure>") == 8
    assert "<script" not in page and "&lt;script&gt;" in page and "&lt;b&gt;0&lt;/b&gt;" in page
    assert page.count("<p>gone &amp; away</p>") == 2 and "0.1250" in page
    assert "http" not in page and 'src="/' not in page


def test_a_png_sheet_shows_the_pictures(results, tmp_path):
    results[0]["hits"] = results[0]["hits"] * 4  # wraps
    contact_sheet.write(tmp_path / "hits.png", results, [results[1]["query"]])
    with Image.open(tmp_path / "hits.png") as image:
        page = np.asarray(image.convert("RGB"))
    line = contact_sheet.SIDE + contact_sheet.LABEL + 16
    assert page.shape[0] == 2 * contact_sheet.MARGIN + 3 * line
    first = page[contact_sheet.MARGIN :][: contact_sheet.SIDE]
    cells = [first[:, contact_sheet.MARGIN + i * contact_sheet.PITCH :][:, :160] for i in range(4)]
    colours = [len(np.unique(cell.reshape(-1, 3), axis=0)) for cell in cells]
    assert colours[1] > 300 and colours[2] > 300  # noise; text on paper has fewer
    assert colours[0] < 256 and colours[3] < 256
    with pytest.raises(ValueError, match="hits.pdf: expected"):
        contact_sheet.write(tmp_path / "hits.pdf", results)
