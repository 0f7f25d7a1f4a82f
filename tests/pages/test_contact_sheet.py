"""Contact sheets: self-contained HTML, PNG with the pictures in their places, text that fits."""

import base64
import io

import numpy as np
import pytest
from PIL import Image, ImageFont

from medsiglip_jax.pages import contact_sheet
from medsiglip_jax.pages.contact_sheet import Sheet, SheetCell, SheetSection


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


def test_an_html_sheet_holds_the_pictures_of_one_query_at_a_time(results, tmp_path, monkeypatch):
    import weakref

    made, most = [], []

    def thumbnail(source, dicom):
        picture = Image.new("RGB", (2, 2))
        made.append(weakref.ref(picture))
        most.append(sum(reference() is not None for reference in made))
        return picture

    monkeypatch.setattr(contact_sheet, "thumbnail", thumbnail)
    contact_sheet.write(tmp_path / "hits.html", results * 10)
    assert (tmp_path / "hits.html").read_text().count("data:image/jpeg") == 60
    assert max(most) <= 2 * len(results[0]["hits"])


def test_exact_pictures_have_the_same_pixels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)
    cell = SheetCell(Image.fromarray(pixels), "a", notes=["one", "two"])
    sheet = Sheet("Title & more", "foot", [SheetSection([cell])], exact=True)
    contact_sheet.draw(tmp_path / "sheet.html", sheet)
    page = (tmp_path / "sheet.html").read_text()
    assert "<h1>Title &amp; more</h1>" in page and "<span>two</span>" in page and "foot" in page
    encoded = page.split("data:image/png;base64,")[1].split('"')[0]
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as image:
        np.testing.assert_array_equal(np.asarray(image), pixels)


def test_a_png_that_would_be_too_large_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(contact_sheet, "MAX_PIXELS", 10_000)
    sheet = Sheet("", "", [SheetSection([SheetCell("text", "a")] * 3)])
    with pytest.raises(ValueError, match="a PNG of 3 pictures would have .* ending in .html"):
        contact_sheet.draw(tmp_path / "sheet.png", sheet)
    assert not list(tmp_path.iterdir())


def test_text_is_wrapped_between_words_and_names_keep_their_end():
    font = ImageFont.load_default(13)
    lines = contact_sheet._wrapped("several words and averyverylongwordindeed" * 3, 90, font)
    assert "".join(lines).replace(" ", "") == ("severalwordsandaveryverylongwordindeed" * 3)
    assert all(font.getlength(line) <= 90 for line in lines) and lines[0] == "several words"
    assert contact_sheet._end("folder/with/a/long/name/1.png", 90, font).endswith("/1.png")
    assert contact_sheet._end("1.png", 90, font) == "1.png"
