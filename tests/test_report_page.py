"""The page of results in a browser."""

import shutil
import struct
import zlib

import pytest
from test_tables import record_of

from experiments.tables.cells import cells, tidy
from experiments.tables.html import write_report

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture
def page_file(tmp_path):
    """A page with a table at reduced scale, one compared with the paper, and a figure."""
    tables, records = {}, {}
    for name, samples in (("table5_digits", 360), ("table4", 50_000)):
        found = [
            record_of(cell, top1=90 - 7.5 * place, samples=samples, notes=["<b>less</b> & more"])
            for place, cell in enumerate(cells(name)[:6])
        ]
        tables[name] = tidy(name, found)
        records |= {record["run_id"]: record for record in found}
    figure = tmp_path / "front.png"
    figure.write_bytes(png(40, 30))
    path = tmp_path / "report.html"
    write_report(path, tables, records, {figure: "Accuracy against bytes."})
    return path


def png(width, height):
    """A grey image."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    rows = b"".join(b"\0" + b"\x80" * width for _ in range(height))
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def test_page_stands_alone_and_says_what_was_not_run(page_file):
    text = page_file.read_text()
    assert "http:" not in text and "https:" not in text and '<link rel="stylesheet' not in text
    assert "&lt;b&gt;less&lt;/b&gt; &amp; more" in text and "<b>less" not in text
    assert text.count("data:image/png;base64,") == 1
    for name in ("table3", "table3_lite", "table5"):
        assert f'<section id="{name}">' in text
    assert "reproduced" in text and "reduced scale" in text and "not run" in text


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_page_works_in_a_browser(page_file):
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    complaints = []
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("requestfailed", lambda request: complaints.append(request.url))
        page.goto(page_file.as_uri())

        assert page.locator("figure img").evaluate("image => image.naturalWidth") == 40
        assert page.locator("section table").count() >= 10

        table = page.locator("#table4 table").first
        heading = table.locator("th", has_text="ours")
        column = heading.evaluate("th => th.cellIndex")

        def numbers():
            texts = table.locator(f"tbody td:nth-child({column + 1})").all_inner_texts()
            return [float(text.split()[0]) for text in texts if text.strip()]

        heading.locator("button").click()
        assert heading.get_attribute("aria-sort") == "ascending"
        assert len(numbers()) > 2 and numbers() == sorted(numbers())
        heading.locator("button").click()
        assert numbers() == sorted(numbers(), reverse=True)

        tip = page.locator("#run")
        assert tip.is_hidden()
        line = page.locator("#table5_digits tr[data-runs]").first
        line.hover()
        assert tip.is_visible() and "model.name" in tip.inner_text()
        link = tip.locator("a").first
        assert link.get_attribute("href") == f"records/{line.get_attribute('data-runs')}.json"
        page.keyboard.press("Escape")
        assert tip.is_hidden()

        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            page.set_viewport_size({"width": 390, "height": 800})
            assert page.evaluate("document.documentElement.scrollWidth") <= 390
            style = "(name) => getComputedStyle(document.body)[name]"
            ink, paper = page.evaluate(style, "color"), page.evaluate(style, "backgroundColor")
            assert ink != paper
        line.click()
        box = tip.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 390
        browser.close()
    assert complaints == []
