# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""What docs/vectorization.md says of eleven idioms: their strategies, and that both forms are one density."""

import re
import textwrap
import warnings
from pathlib import Path

import pytest
import torch
from pyro.infer import config_enumerate

from pyro_artransform.model import LogJoint

PAGE = (Path(__file__).parents[2] / "docs" / "vectorization.md").read_text()
BEGINNING, *SECTIONS = re.split(r"^## ", PAGE, flags=re.MULTILINE)
IDIOMS = {s.partition(":")[0]: s for s in SECTIONS if ": from " in s.splitlines()[0]}


def blocks(text):
    return re.findall(r"^```py\w*\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def of_idiom(section):
    (code,) = blocks(section)
    return code.split("# faster\n")


def names():
    found = {"print": lambda *words: None}
    (code,) = blocks(BEGINNING)
    exec(compile(code, "vectorization.md", "exec"), found)
    return found


def model(code):
    found = names()
    exec(compile("def model():\n" + textwrap.indent(code, "    "), "page", "exec"), found)
    return config_enumerate(found["model"])


def test_the_page():
    assert len(IDIOMS) == 11
    log_joint = names()["log_joint"]
    assert (log_joint.strategy, log_joint.obstacle) == ("plate", "")


@pytest.mark.parametrize("title", IDIOMS)
def test_both_forms_have_one_density(title):
    heading = IDIOMS[title].splitlines()[0]
    expected = re.fullmatch(r".*: from (\w+) to (\w+)", heading).groups()
    with warnings.catch_warnings():  # of torch, about numbers of latents
        warnings.simplefilter("ignore")
        forms = [LogJoint(model(code)) for code in of_idiom(IDIOMS[title])]
        assert tuple(form.strategy for form in forms) == expected, forms[1].obstacle
        z = torch.randn(20, forms[0].latents.latent_dim)
        with torch.no_grad():
            found, after = (form(z) for form in forms)
    torch.testing.assert_close(found, after)
