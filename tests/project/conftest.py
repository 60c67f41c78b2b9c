# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Tests of what is around the package: pages, notebooks, the release and the requests to Pyro."""

import re
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("project")


def python_blocks(page: str) -> str:
    """The Python blocks of a page, one after the other."""
    return "\n".join(re.findall(r"^```python\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE))


def shortened(code: str) -> str:
    """Code with fits of five steps and a second, chains of a second, and few draws and data sets."""

    def short_fit(call: re.Match[str]) -> str:
        arguments = re.sub(r", (epochs|num_steps|seed|progress)=\w+", "", call[1])
        arguments = re.sub(r"draws=\d+", "draws=16", arguments)
        # the verdict on so short a fit is of no interest
        return f"= fit({arguments}, num_steps=5, max_seconds=1, progress=False, seed=0)"

    code = re.sub(r"= fit\((.*?)\)", short_fit, code)
    code = re.sub(r"num_simulations=\d+", "num_simulations=10", code)
    short_mcmc = r"= mcmc(\1, draws=16\2, max_seconds=1, progress=False)"
    code = re.sub(r"= mcmc\((.*?), draws=\d+([^()]*)\)", short_mcmc, code)
    code = re.sub(r"range\(\d{3,}\)", "range(5)", code)
    return re.sub(r"(importance\(.*), \d+, ", r"\1, 30, ", code)
