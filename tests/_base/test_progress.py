# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import io
import math
import random
import re
import sys
import time
from contextlib import suppress

import numpy as np
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

from pyro_artransform._base.progress import ProgressBar, progress_bar, seeded
from pyro_artransform.sampling import mcmc
from tests.inference import models
from tests.inference.conftest import quick_fit


def drawn():
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_repeatable_and_without_trace():
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    expected = drawn()
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])
    with suppress(ZeroDivisionError), seeded(3):
        first = drawn()
        _ = 1 / 0
    with seeded(3):
        assert drawn() == first
    assert drawn() == expected
    with seeded(None):
        assert drawn() not in (first, expected)


def test_shows_epochs_steps_and_elbo(capsys):
    with progress_bar(True) as bar:
        bar.say("fit")
        bar.update([2.0, math.nan, 4.0], 10, "epoch 1/2", "batch 2/5")
    shown = capsys.readouterr().err
    for words in ("epoch 1/2", "3/10", "batch 2/5, ELBO -3.000"):
        assert words in shown


def test_phases_without_steps_have_a_name_and_the_time(monkeypatch):
    shown = type("Stream", (io.StringIO,), {"isatty": lambda _: True})()
    monkeypatch.setattr(sys, "stderr", shown)
    with progress_bar(True) as bar:
        bar.say("start")
        assert shown.getvalue().split("\r")[-1].startswith("start [00:00")
        bar.say("fit")
        bar.update([2.0] * 4, 4)
        bar.bar.refresh()
        assert "fit: 100%" in shown.getvalue().split("\r")[-1]
        bar.say("chains")
        assert shown.getvalue().split("\r")[-1].startswith("chains [00:00, 4 steps, ELBO -2.000]")
    assert "0step" not in shown.getvalue()
    assert ": :" not in shown.getvalue()


def test_what_a_fit_does_is_shown(monkeypatch):
    said = []
    monkeypatch.setattr(ProgressBar, "say", lambda _, what: said.append(what))
    quick_fit(models.funnel, AutoNormal(models.funnel), num_steps=1, seed=0)
    assert said == ["start", "chains", "fit", "verdict"]
    said.clear()
    mcmc(models.location, draws=5)
    assert said == ["chains"]


def test_one_line_where_nobody_watches(capsys):
    with progress_bar(True) as bar:
        for what in ("start", "fit", "verdict"):
            bar.say(what)
            for step in range(200):
                bar.update([1.0] * step, 400)
    shown = capsys.readouterr().err
    assert re.split("[\\r\\n]", shown.strip())[0] == shown.strip()
    assert "verdict" in shown


def test_a_line_every_half_minute_in_a_log(capsys, monkeypatch):
    """In phases without steps, too."""
    now = [0.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    with progress_bar(True) as bar:
        bar.say("start")
        bar.bar.last_print_t = 0.0
        for now[0] in range(100):
            bar.tick()
    lines = capsys.readouterr().err.strip().split("\n")
    assert len(lines) == 3
    assert all("start" in line and "\r" not in line for line in lines)


@pytest.mark.parametrize("is_live", [False, True])
def test_an_error_leaves_no_unfinished_bar(monkeypatch, is_live):
    shown = type("Stream", (io.StringIO,), {"isatty": lambda _: is_live})()
    monkeypatch.setattr(sys, "stderr", shown)
    with suppress(ZeroDivisionError), progress_bar(True) as bar:
        bar.say("start")
        _ = 1 / 0
    assert not shown.getvalue().split("\r")[-1].strip()


@pytest.mark.parametrize("is_notebook", [False, True])
def test_is_live_on_a_terminal_and_in_a_notebook_without_widgets(monkeypatch, is_notebook):
    """What a kernel has for ``stderr`` is not a terminal, and is shown as it is written."""
    shown = type("Stream", (io.StringIO,), {"isatty": lambda _: not is_notebook})()
    type(shown).__module__ = "ipykernel.iostream" if is_notebook else "io"
    monkeypatch.setattr(sys, "stderr", shown)
    with progress_bar(True) as bar:
        for what in ("start", "step size", "fit"):
            bar.say(what)
            assert what in shown.getvalue()


def test_nothing_where_it_is_not_wanted(capsys):
    with progress_bar(False) as bar:
        bar.say("fit")
        bar.update([2.0], 10)
    assert capsys.readouterr() == ("", "")
