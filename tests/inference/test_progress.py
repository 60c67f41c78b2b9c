# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import math
import sys

import pytest

from pyro_artransform.inference.progress import ProgressBar


@pytest.fixture
def tqdm():
    return pytest.importorskip("tqdm")


def test_shows_steps_and_elbo(tqdm, capsys):
    with ProgressBar(True) as bar:
        bar.say("fit")
        bar.update([2.0, math.nan, 4.0], 10)
    shown = capsys.readouterr().err
    assert "fit" in shown
    assert "3/10" in shown
    assert "ELBO -3.000" in shown


def test_number_of_steps_may_be_open(tqdm, capsys):
    with ProgressBar(True) as bar:
        bar.update([math.nan], None)
        bar.update([math.nan, 1.0], None)
        bar._bar.refresh()
    assert "2step" in capsys.readouterr().err


def test_epochs(tqdm, capsys):
    with ProgressBar(True) as bar:
        bar.update([math.nan, 1.0], 10, "epoch 1/2", "batch 2/5")
        bar._bar.refresh()
    shown = capsys.readouterr().err
    assert "epoch 1/2" in shown
    assert "batch 2/5, ELBO -1.000" in shown


def test_nothing_where_it_is_not_wanted(capsys):
    with ProgressBar(False) as bar:
        bar.say("fit")
        bar.update([2.0], 10)
    assert capsys.readouterr() == ("", "")


def test_nothing_where_tqdm_is_not_installed(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with ProgressBar(True) as bar:
        bar.say("fit")
        bar.update([2.0], 10)
    assert capsys.readouterr() == ("", "")


def test_is_closed_by_an_error(tqdm):
    bar = ProgressBar(True)
    with pytest.raises(ZeroDivisionError), bar:
        _ = 1 / 0
    assert bar._bar.disable
