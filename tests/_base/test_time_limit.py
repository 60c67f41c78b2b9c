# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import signal
import time

import pytest

from pyro_artransform._base.time_limit import INTERRUPTED, OUT_OF_TIME, TimeLimit, until_deadline


@pytest.fixture
def clock(monkeypatch):
    """Wall time that passes as a test says."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def wait(seconds):
        now[0] += seconds

    return wait


def taken(clock, items, seconds=1.0, **options):
    found = []
    for item in until_deadline(items, **options):
        found.append(item)
        clock(seconds)
    return found


def test_loops_end_with_the_share_of_their_phase(clock):
    with TimeLimit(10.0) as limit:
        limit.enter_phase(0.45)
        assert taken(clock, range(100)) == [0, 1, 2, 3, 4]
        assert limit.reason == OUT_OF_TIME
        assert taken(clock, range(100)) == []
        assert taken(clock, range(100), at_least=1) == [0]
        limit.enter_phase(1.0)
        assert not limit.reason
        assert len(taken(clock, range(100))) == 4


def test_ctrl_c_ends_phases_and_leaves_a_second_for_the_result(clock):
    with TimeLimit() as limit:
        limit.enter_phase(0.4)
        signal.raise_signal(signal.SIGINT)
        assert limit.reason == INTERRUPTED
        clock(5.0)
        limit.enter_phase(1.0, has_grace=True)
        assert not limit.is_over()
        assert len(taken(clock, range(100), 0.25)) == 4
        assert limit.reason == INTERRUPTED


def test_a_second_ctrl_c_interrupts():
    with TimeLimit():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_handler_that_is_not_pythons(monkeypatch):
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    with TimeLimit(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
