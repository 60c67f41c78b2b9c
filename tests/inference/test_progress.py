# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import io
import math
import random
import re
import signal
import sys
import threading

import numpy as np
import pytest
import torch

from pyro_artransform.inference.progress import noted_interrupts, progress_bar, seeded

# Seeds


def drawn():
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_repeatable_and_without_trace():
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    expected = drawn()
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])
    with seeded(3):
        first = drawn()
    with seeded(3):
        assert drawn() == first
    assert drawn() == expected
    with seeded(None):
        assert drawn() not in (first, expected)


# Interrupts


def test_first_is_noted_and_second_interrupts():
    with noted_interrupts() as requested:
        assert not requested.is_set()
        signal.raise_signal(signal.SIGINT)
        assert requested.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.default_int_handler])
def test_puts_the_handler_back(handler):
    before = signal.signal(signal.SIGINT, handler)
    try:
        with noted_interrupts():
            assert signal.getsignal(signal.SIGINT) != handler
        assert signal.getsignal(signal.SIGINT) == handler
        with pytest.raises(ZeroDivisionError), noted_interrupts():
            _ = 1 / 0
        assert signal.getsignal(signal.SIGINT) == handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_outside_of_the_main_thread():
    found = []

    def run():
        with noted_interrupts() as requested:
            found.append(requested.is_set())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [False]


def test_handler_that_is_not_pythons(monkeypatch):
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with noted_interrupts(), pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


# The progress bar


@pytest.fixture
def tqdm():
    return pytest.importorskip("tqdm")


def test_shows_steps_and_elbo(tqdm, capsys):
    with progress_bar(True) as bar:
        bar.say("fit")
        bar.update([2.0, math.nan, 4.0], 10)
    shown = capsys.readouterr().err
    assert "fit" in shown
    assert "3/10" in shown
    assert "ELBO -3.000" in shown


def test_one_line_where_nobody_looks(tqdm, capsys):
    with progress_bar(True) as bar:
        for what in ("start", "fit", "verdict"):
            bar.say(what)
            for step in range(200):
                bar.update([1.0] * step, 400)
    shown = capsys.readouterr().err
    assert re.split("[\\r\\n]", shown.strip())[0] == shown.strip()
    assert "verdict" in shown


def test_goes_on_where_somebody_looks(tqdm, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress_bar(True) as bar:
        bar.say("start")
        assert "start" in capsys.readouterr().err
        bar.say("fit")
        assert "fit" in capsys.readouterr().err


def test_goes_on_in_a_notebook_without_widgets(tqdm, monkeypatch):
    """What a kernel has for ``stderr`` is no terminal, and is shown as it is written."""
    kind = type("OutStream", (io.StringIO,), {"__module__": "ipykernel.iostream"})
    shown = kind()
    monkeypatch.setattr(sys, "stderr", shown)
    with progress_bar(True) as bar:
        for what in ("start", "step size", "fit"):
            bar.say(what)
            assert what in shown.getvalue()


def test_epochs(tqdm, capsys):
    with progress_bar(True) as bar:
        bar.update([math.nan, 1.0], 10, "epoch 1/2", "batch 2/5")
        bar.bar.refresh()
    shown = capsys.readouterr().err
    assert "epoch 1/2" in shown
    assert "batch 2/5, ELBO -1.000" in shown


def test_nothing_where_it_is_not_wanted(capsys):
    with progress_bar(False) as bar:
        bar.say("fit")
        bar.update([2.0], 10)
    assert capsys.readouterr() == ("", "")


def test_nothing_where_tqdm_is_not_installed(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with progress_bar(True) as bar:
        bar.say("fit")
        bar.update([2.0], 10)
    assert capsys.readouterr() == ("", "")


def test_is_closed_by_an_error(tqdm):
    with pytest.raises(ZeroDivisionError), progress_bar(True) as bar:
        _ = 1 / 0
    assert bar.bar.disable
