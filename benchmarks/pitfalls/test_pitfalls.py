# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""None of the known failures of flow libraries happens here."""

from collections.abc import Callable

import pytest

from pitfalls.cases import CASES
from pitfalls.ours import Ours
from pitfalls.subject import Subject, prepare


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Ours:
    return Ours(tmp_path_factory.mktemp("pitfalls"))


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_pitfall(case: Callable[[Subject], None], ours: Ours) -> None:
    prepare()
    case(ours)


def test_every_failure_has_a_case() -> None:
    numbers = {int(name[1:3]) for name in CASES}
    assert numbers == {*range(1, 32), *range(38, 46)}
