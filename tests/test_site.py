"""The documentation site builds strictly, documents what is public, and needs no other server."""

import dataclasses
import inspect
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import jlcm
from jlcm.quantize import METHODS

for package in ("mkdocs", "material", "mkdocstrings_handlers"):
    pytest.importorskip(package, reason='pip install -c constraints.txt -e ".[docs]"')

ROOT = Path(__file__).parent.parent
#: Attributes of elements that make a browser fetch something (links in the text do not).
_FETCHED = {"img": "src", "script": "src", "iframe": "src", "source": "src", "link": "href"}


class Page(HTMLParser):
    """What the tests look at of a page: identifiers, links, fetched files and text."""

    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.fetched, self.words = set(), [], [], []
        self.feed(path.read_text())
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.ids.add(values.get("id"))
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if address := values.get(_FETCHED.get(tag)):
            self.fetched.append(address)

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Pages by their path; the build ends with an error at the first warning."""
    folder = tmp_path_factory.mktemp("site")
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return {path: Page(path) for path in folder.rglob("*.html")}


def page(site, name):
    (found,) = [page for path, page in site.items() if path.as_posix().endswith(f"/{name}.html")]
    return found


def words(text):
    """Letters and digits alone: how a page marks up names and quotes does not matter."""
    return re.sub(r"\W+", " ", text).strip()


def check_entry(entries, identifier, thing):
    """A page has an entry, and its text and every field or parameter are in it and described."""
    assert identifier in entries.ids
    document = inspect.getdoc(thing)
    assert words(document.splitlines()[0]) in words(entries.text), identifier
    if dataclasses.is_dataclass(thing):
        names = [field.name for field in dataclasses.fields(thing)]
    else:
        names = [] if isinstance(thing, type) else list(inspect.signature(thing).parameters)
    for name in names:
        kinds = [thing, *thing.__mro__] if isinstance(thing, type) else [thing]
        described = [f"\n    {name}: " in (inspect.getdoc(kind) or "") for kind in kinds]
        assert any(described), f"{name} of {identifier} has no description"


@pytest.mark.parametrize("name", jlcm.__all__)
def test_public_names_are_documented(site, name):
    check_entry(page(site, "api/jlcm"), f"jlcm.{name}", getattr(jlcm, name))


@pytest.mark.parametrize("method", METHODS)
def test_methods_and_their_options_are_documented(site, method):
    options = METHODS[method].options
    identifier = f"{options.__module__}.{options.__qualname__}"
    check_entry(page(site, "api/methods"), identifier, options)
    assert f"| `{method}` |" in (ROOT / "docs/methods.md").read_text()
    assert f'"{method}"' in jlcm.quantize.__doc__


def test_links_lead_somewhere(site):
    for path, found in site.items():
        if path.name == "404.html":  # served at any address: its links are absolute
            continue
        for link in found.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.is_file(), f"{path.name}: {link}"
            if parts.fragment and target in site:
                assert unquote(parts.fragment) in site[target].ids, f"{path.name}: {link}"


def test_nothing_is_fetched_from_elsewhere(site):
    folder = min(site, key=lambda path: len(path.parts)).parent
    for path, found in site.items():
        for address in found.fetched:
            parts = urlsplit(address)
            assert not parts.netloc, f"{path.name}: {address}"
        assert "mermaid" not in path.read_text()  # the theme would fetch its renderer
    for path in folder.rglob("*.css"):
        style = path.read_text()
        assert not re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", style), path.name


def test_readme_is_the_home_page(site):
    """Its links lead to pages, where the repository has them as files."""
    home, readme = page(site, "index"), (ROOT / "README.md").read_text()
    assert words(readme.splitlines()[2]) in words(home.text)
    linked = {link.partition("#")[0] for link in home.links}
    for name in re.findall(r"\]\(docs/(\w+)\.md\)", readme):
        assert f"{name}.html" in linked
    assert "results.html" in linked and not any(link.endswith(".md") for link in linked)


@pytest.mark.parametrize(
    ("markdown", "source", "expected"),
    [
        ("[a](docs/format.md#tensors)", "README.md", "[a](format.md#tensors)"),
        ("![a](docs/images/init.png)", "README.md", "![a](images/init.png)"),
        ("[a](../README.md)", "docs/api/jlcm.md", "[a](../README.md)"),  # leads nowhere: an error
        ("[a](../../README.md)", "docs/api/jlcm.md", "[a](../index.md)"),
        ("[a](../docs/format.md)", "results/README.md", "[a](format.md)"),
        ("[`a`](../run.py)", "docs/format.md", "`a`"),
        ("[a](https://x.org/docs/format.md)", "README.md", "[a](https://x.org/docs/format.md)"),
        ("[a](docs/missing.md)", "README.md", "[a](docs/missing.md)"),
    ],
)
def test_links_between_files_become_links_between_pages(markdown, source, expected):
    from scripts.site_pages import site_links

    assert site_links(markdown, source) == expected
