# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""
Checks a built site: every link and picture is there, and nothing is loaded from the network.

    python docs/check_site.py docs/_build/html
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# What a browser loads by itself, by tag. A link to elsewhere is loaded by nobody but its reader.
LOADED = {"img": "src", "script": "src", "link": "href", "source": "src", "iframe": "src"}


class Page(HTMLParser):
    """What one page refers to, and the places in it that others may refer to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(text)

    def has(self, anchor: str) -> bool:
        """Whether there is such a place; the empty name is the page itself."""
        return not anchor or anchor in self.anchors

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value for name, value in attrs if value}
        self.anchors |= {found[name] for name in ("id", "name") if name in found}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        if tag in LOADED and LOADED[tag] in found:
            self.loaded.append(found[LOADED[tag]])


def faults(site: Path) -> list[str]:
    """What is wrong with the pages of a folder, a line each.

    :raises ValueError: if there are no pages.
    """
    site = site.resolve()
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    if not pages:
        raise ValueError(f"site: expected a folder with pages, got {site}")
    found = []
    for path, page in sorted(pages.items()):
        where = path.relative_to(site)
        for target in page.loaded:
            if urlsplit(target).netloc:
                found.append(f"{where}: loads {target} from the network")
        for target in [*page.links, *page.loaded]:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            file = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not file.exists():
                found.append(f"{where}: {target} is not there")
            elif file in pages and not pages[file].has(unquote(parts.fragment)):
                found.append(f"{where}: {target} has no such place")
    return found


def main() -> None:
    """Prints the faults of the site that is named on the command line, and fails if there are some."""
    site = Path(sys.argv[1])
    found = faults(site)
    print("\n".join([*found, f"{len(list(site.rglob('*.html')))} pages, {len(found)} faults"]))
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
