# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Formulas as MathML, which browsers show without a script from the network: Sphinx's own way needs one."""

import re
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging

_LOGGER = logging.getLogger(__name__)
_THIN = '<mspace width="0.1667em"></mspace>'


def from_tex(text: str, *, as_block: bool = False) -> str:
    r"""Docutils' MathML: ``\frac12`` is one half, not 12 over what follows, with spaces in ``s \sinh x``.

    :raises MathError: if it cannot read the formula.
    """
    digits_apart = re.sub(r"(\\[dt]?frac)(\d)(\d)", r"\1{\2}{\3}", text)
    found = str(tex2mathml(digits_apart, as_block=as_block))
    found = re.sub(r"(<mi[^>]*>\w+</mi>\s*<mo>&ApplyFunction;</mo>)", rf"{_THIN}\1", found)
    return re.sub(r"(&ApplyFunction;</mo>)(?!\s*<mo)", rf"\1{_THIN}", found)


def _mathml(node: nodes.Element, *, as_block: bool) -> str:
    try:
        return from_tex(node.astext(), as_block=as_block)
    except MathError as error:
        _LOGGER.warning("a formula that cannot be shown: %s", error, location=node)
        return f"<code>{node.astext()}</code>"


def _visit_inline(self: Any, node: nodes.math) -> None:
    self.body.append(_mathml(node, as_block=False))
    raise nodes.SkipNode


def _visit_block(self: Any, node: nodes.math_block) -> None:
    self.body.append(f'<div class="math-block">{_mathml(node, as_block=True)}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Makes it the way in which Sphinx writes formulas."""
    app.add_html_math_renderer("mathml", (_visit_inline, None), (_visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
