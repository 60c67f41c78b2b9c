# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""The site: its own pages, the tutorials as they were saved, benchmarks, and the API from docstrings.

``make docs`` builds it. Nothing is fetched while it is built, nor when it is read: the names of Pyro and of
PyTorch are not links, since their inventories are on the network.
"""

import shutil
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.util.nodes import make_refnode

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path[:0] = [str(ROOT), str(DOCS)]

from pyro_artransform import __version__  # noqa: E402

# What the site shows from other folders, copied beside the pages so that links and pictures are found.
GATHERED = {"tutorials": ("*.ipynb", "*.png"), "benchmarks": ("*.md", "*.png")}
for _folder, _patterns in GATHERED.items():
    shutil.rmtree(DOCS / _folder, ignore_errors=True)
    (DOCS / _folder).mkdir()
    for _pattern in _patterns:
        for _path in (ROOT / _folder).glob(_pattern):
            shutil.copy2(_path, DOCS / _folder)

project = "pyro_artransform"
author = "Contributors to the pyro_artransform project"
copyright = author
version = release = __version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "bibliography", "mathml"]
exclude_patterns = ["_build"]
nitpicky = True
# names of others, which are no links, and the package's own that are for nobody to call
nitpick_ignore_regex = [
    (r"py:.*", r"(collections|contextlib|matplotlib|os|pyro|torch|typing)\..*"),
    (r"py:.*", "Tensor|Transform"),
    (r"py:.*", r"pyro_artransform\.(_base|plots|flows\.conditioners\.blocks)\..*"),
    (r"py:.*", r"pyro_artransform\.(guides\.base|diagnostics\.result_io)\..*"),
    (
        r"py:.*",
        r"pyro_artransform\.model\.(coordinates\.latent_mapper|full_data_density\.Anchor|initial_point).*",
    ),
]

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
myst_update_mathjax = False
html_math_renderer = "mathml"
nb_execution_mode = "off"

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_default_options = {"exclude-members": "extra_repr"}
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 140
add_module_names = False

html_theme = "furo"
html_title = f"pyro_artransform {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False


def _from_the_root(app: Any, path: Path, parent: str, content: list[str]) -> None:
    """Links of the README and its like to pages, where a page shows a part of them."""
    for at_root, page in {
        "docs/": "",
        "CONTRIBUTING": "contributing",
        "SECURITY": "security",
    }.items():
        content[0] = content[0].replace(f"]({at_root}", f"]({page}")


def _to_gathered(app: Any, page: str, source: list[str]) -> None:
    """Links between folders of the checkout, as links between their copies on the site."""
    if "/" in page:
        source[0] = source[0].replace("](../docs/", "](../")
    else:
        for folder in GATHERED:
            source[0] = source[0].replace(f"](../{folder}/", f"]({folder}/")


def _to_reference(app: Any, doctree: nodes.document, page: str) -> None:
    """Links the first mention of a public name on a page to the reference.

    That of a module only if it is dotted: `model` may be anything.
    """
    if "/" in page:
        return
    objects, linked = app.env.get_domain("py").objects, set[str]()
    for literal in [*doctree.findall(nodes.literal)]:
        name = literal.astext()
        full = [f"{room}{name}" for room in ("", "pyro_artransform.", "pyro_artransform.flows.")]
        found = next((objects[target] for target in full if target in objects), None)
        if found is None or (found.objtype == "module" and "." not in name):
            continue
        if name in linked or isinstance(literal.parent, nodes.reference | nodes.title):
            continue
        linked.add(name)
        to = make_refnode(app.builder, page, found.docname, found.node_id, literal.deepcopy(), name)
        literal.replace_self(to)


def _without_aliases(
    app: Any, what: str, name: str, value: Any, options: Any, lines: list[str]
) -> None:
    """A field of a named tuple has no docstring of its own but its number."""
    if lines and lines[0].startswith("Alias for field number"):
        lines.clear()


def _with_links(
    app: Any,
    what: str,
    name: str,
    value: Any,
    options: Any,
    arguments: str | None,
    result: str | None,
) -> tuple[str | None, str | None]:
    """A signature with ``<factory>`` in it is no Python, so that its types would be no links."""
    return arguments and arguments.replace("<factory>", "..."), result


def setup(app: Any) -> None:
    """Has Sphinx ask about pages, files that they include, docstrings and signatures."""
    app.connect("include-read", _from_the_root)
    app.connect("source-read", _to_gathered)
    app.connect("doctree-resolved", _to_reference)
    app.connect("autodoc-process-docstring", _without_aliases)
    app.connect("autodoc-process-signature", _with_links)
