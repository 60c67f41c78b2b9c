# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Bytes of guide files and checkpoints changed anywhere: a ValueError, or the same numbers."""

import functools
import tempfile
from pathlib import Path

import pyro
import torch
from hypothesis import strategies as st

from pyro_artransform import AutoIAF
from tests.attack.effort import attack, note
from tests.inference import models
from tests.inference.conftest import quick_fit
from tests.inference.models import small

EDITS = ("set", "flip a bit", "cut", "insert", "delete", "zeros", "swap")


@st.composite
def damages(draw):
    """An edit, as a share of the file where it is, and bytes."""
    content = st.binary(min_size=1, max_size=20)
    return (
        draw(st.sampled_from(EDITS)),
        draw(st.floats(0, 0.9999)),
        draw(content),
        draw(st.booleans()),
    )


def damage(content, edit):
    how, share, new, near_end = edit
    # half of all edits near the end, where an archive keeps its directory
    start = len(content) - min(len(content), 2000) if near_end else 0
    at = start + int(share * (len(content) - start))
    if how == "set":
        return content[:at] + new + content[at + len(new) :]
    if how == "flip a bit":
        flipped = bytes(byte ^ (1 << new[0] % 8) for byte in content[at : at + 1])
        return content[:at] + flipped + content[at + 1 :]
    if how == "cut":
        return content[:at]
    if how == "insert":
        return content[:at] + new + content[at:]
    if how == "delete":
        return content[:at] + content[at + len(new) :]
    if how == "zeros":
        return content[:at] + bytes(len(content) - at)
    return content[at:] + content[:at]


def model():
    return models.regression()


@functools.cache
def guide_file():
    """The bytes of a guide's file, and draws with their densities."""
    guide = small(model)
    guide.sample_posterior(1)
    torch.nn.utils.vector_to_parameters(
        0.3 * torch.randn(sum(p.numel() for p in guide.parameters())), guide.parameters()
    )
    draws = guide.sample_posterior(5)
    with tempfile.TemporaryDirectory() as folder:
        guide.save(Path(folder) / "guide")
        return (Path(folder) / "guide").read_bytes(), draws, guide.log_prob(draws).detach()


@functools.cache
def checkpoint_file():
    """The bytes of a checkpoint in the middle of a fit, and the history and ELBO that follow."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fit"
        options = {"num_steps": 24, "num_particles": 4, "progress": False}
        quick_fit(
            model, small(model), seed=3, checkpoint=path, callback=lambda k, _: k == 12, **options
        )
        content = path.read_bytes()
        pyro.clear_param_store()
        rest = quick_fit(model, small(model), resume=path, **options)
    return content, (rest.history, rest.elbo, rest.khat, rest.verdict, rest.num_gradients)


def written(content, folder):
    path = Path(folder) / "damaged"
    path.write_bytes(content)
    return path


@attack(
    "files",
    few=20,
    edits=st.lists(damages(), min_size=1, max_size=2),
    with_model=st.booleans(),
)
def test_damaged_guides(edits, with_model):
    content, draws, expected = guide_file()
    for edit in edits:
        content = damage(content, edit)
    with tempfile.TemporaryDirectory() as folder:
        path = written(content, folder)
        try:
            guide = AutoIAF.load(path, model if with_model else None)
        except ValueError:
            note("files refused")
            return
        note("files still whole")
        if with_model:
            guide()
    assert torch.equal(guide.log_prob(draws), expected)


@attack("files", few=3, edit=damages())
def test_damaged_checkpoints(edit):
    content, expected = checkpoint_file()
    pyro.clear_param_store()
    with tempfile.TemporaryDirectory() as folder:
        path = written(damage(content, edit), folder)
        try:
            rest = quick_fit(model, small(model), resume=path, num_particles=4, progress=False)
        except ValueError:
            note("files refused")
            return
    note("files still whole")
    assert (rest.history, rest.elbo, rest.khat, rest.verdict, rest.num_gradients) == expected
