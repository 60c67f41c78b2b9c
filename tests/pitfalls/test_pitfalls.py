# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""None of the known failures of flow libraries happens here."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.pitfalls.cases import CASES
from tests.pitfalls.ours import Ours
from tests.pitfalls.subject import Subject
from tests.pitfalls.tensor_cases import bare_factory_calls


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Ours:
    return Ours(tmp_path_factory.mktemp("pitfalls"))


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_pitfall(case: Callable[[Subject], None], ours: Ours) -> None:
    case(ours)


def test_every_failure_has_a_case() -> None:
    numbers = {int(name[1:3]) for name in CASES}
    assert numbers == {*range(1, 32), *range(38, 46)}


@pytest.mark.parametrize(
    ("line", "faulty"),
    [
        ("torch.zeros(3)", True),
        ("torch.zeros(3, dtype=x.dtype)", True),
        ("torch.zeros(3, dtype=x.dtype, device=x.device)", False),
        ("torch.zeros(3, **like)", False),
        ("torch.arange(3)", True),
        ("torch.arange(3, device=x.device)", False),
        ("torch.zeros_like(x)", False),
        ("x.new_zeros(3)", False),
        ("x.cuda(0)", True),
        ("x.cpu()", True),
    ],
)
def test_lint_of_factory_calls(line: str, faulty: bool, tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(f"def f(x, like):\n    return {line}\n")
    assert bool(bare_factory_calls(path)) == faulty
