"""Hook of MkDocs: pages made of files outside docs/, and links that leave docs/ or enter it.

Files of the repository link to each other by their places in it, as a code host shows them. On the
site a link goes to the page that is made of its target; to a file that is no page, no link is left.
"""

import re
from os.path import dirname, join, normpath, relpath
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
#: Pages and pictures that are made of files outside docs/, by the file's path in the repository.
PAGES = {"README.md": "index.md", "results/README.md": "results.md"} | {
    str(path.relative_to(ROOT)): str(path.relative_to(ROOT))
    for pattern in ("results/tables/*.md", "results/figures/*.png")
    for path in sorted(ROOT.glob(pattern))
}
_LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^]]*)\]\((?P<target>[^)#\s]+)(?P<anchor>#[^)]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made of files outside docs/."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between pages."""
    sources = {made: source for source, made in PAGES.items()}
    return site_links(markdown, sources.get(page.file.src_uri, f"docs/{page.file.src_uri}"))


def site_links(markdown: str, source: str) -> str:
    """Links as the site needs them.

    Args:
        markdown: text of a file.
        source: path of the file in the repository.

    Returns:
        The text. A link to a file that is no page has become its words; one that leads nowhere, or
        out of the repository, is as it was.
    """
    page = _page_of(source)

    def replaced(link: re.Match[str]) -> str:
        target = normpath(join(dirname(source), link["target"]))
        if ":" in link["target"] or not (ROOT / target).exists():
            return link[0]
        if (there := _page_of(target)) is None:
            return link["text"]
        there = relpath(there, dirname(page) or ".")
        return f"{link['image']}[{link['text']}]({there}{link['anchor'] or ''})"

    return _LINK.sub(replaced, markdown)


def _page_of(source: str) -> str | None:
    """Place below docs/ of what is made of a file, None where nothing is."""
    inside = source.removeprefix("docs/")
    return PAGES.get(source) or (inside if inside != source else None)
