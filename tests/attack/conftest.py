# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""The counts of an attack, after its tests."""

from collections import Counter

from tests.attack.effort import NOTED, SEED, TRIED


def pytest_terminal_summary(terminalreporter):
    if not TRIED:
        return
    by_kind = Counter()
    for (kind, _), count in TRIED.items():
        by_kind[kind] += count
    counts = ", ".join(f"{kind} {count}" for kind, count in sorted(by_kind.items()))
    total = sum(by_kind.values())
    terminalreporter.write_line(f"attack: {total} examples (seed {SEED}): {counts}")
    if NOTED:
        noted = ", ".join(f"{words} {count}" for words, count in sorted(NOTED.items()))
        terminalreporter.write_line(f"attack: {noted}")
