# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import math
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from pyro_artransform.diagnostics import Importance, compare


@dataclass
class Result:
    """What a comparison reads of the result of a fit."""

    log_evidence: float
    log_evidence_se: float = 0.01
    khat: float = 0.2
    trusted: bool = True


def test_sorted_by_evidence_with_differences_and_probabilities():
    found = compare(
        {"b": Result(-12.0, 0.03), "a": Result(-10.0, 0.04), "c": Result(-13.0, trusted=False)}
    )
    assert list(found.models) == ["a", "b", "c"]
    a, b, c = found.models.values()
    assert (a.difference, a.difference_se) == (0.0, 0.0)
    assert (b.difference, b.difference_se) == pytest.approx((-2.0, 0.05))
    assert b.log_evidence_se == 0.03
    weights = [1.0, math.exp(-2), math.exp(-3)]
    assert [m.probability for m in (a, b, c)] == pytest.approx([w / sum(weights) for w in weights])
    assert [m.trusted for m in (found, a, b, c)] == [False, True, True, False]
    assert found.words == (
        "'a' has the largest evidence, 2.000 ± 0.050 nats more than 'b', a Bayes factor of 7.39. 'c' is "
        "not trusted: see its verdict. Its evidence lacks what its guide missed."
    )


@pytest.mark.parametrize(
    ("worse", "trusted", "words"),
    [
        (Result(9.0, trusted=False), False, "No conclusion: of the two largest evidences not both"),
        (Result(-9.0, trusted=False), False, "'b' is not trusted: see its verdict"),
        (Result(-3.0, khat=0.8), True, "k-hat of 'b' is 0.80, above 0.7: its evidence rests on a"),
        (Result(-3.0, khat=0.6), True, "k-hat of 'b' is 0.60, above 0.5: its standard error is"),
        (Result(-0.2, 0.3), True, "have the same evidence as far as is known (0.200 ± 0.300 nats)"),
        (
            Result(-1e6),
            True,
            "'a' has the largest evidence, 1000000.000 ± 0.014 nats more than 'b'.",
        ),
    ],
)
def test_what_speaks_against_a_conclusion_is_said(worse, trusted, words):
    found = compare({"a": Result(0.0), "b": worse})
    assert found.trusted == trusted
    assert words in found.words
    assert "'a' is not" not in found.words


def test_weights_without_a_verdict_are_judged_by_khat():
    light = Importance.from_log_weights(0.1 * torch.randn(1000))
    heavy = Importance.from_log_weights(2 * torch.empty(1000).exponential_())
    found = compare({"light": light, "heavy": heavy})
    assert [found.models[name].trusted for name in ("light", "heavy")] == [True, False]


def test_shown():
    found = compare({"linear": Result(-10.0), "square": Result(-12.5, trusted=False)})
    first, head, *rows = repr(found).splitlines()
    assert first == f"Comparison: {found.words}"
    assert " ".join(head.split()) == "model log evidence se difference se probability trusted"
    assert rows[0].split() == ["linear", "-10.000", "0.010", "0.000", "0.000", "0.924", "yes"]
    assert rows[1].split() == ["square", "-12.500", "0.010", "-2.500", "0.014", "0.076", "no"]


@pytest.mark.parametrize(
    ("results", "error", "words"),
    [
        ({"a": Result(0.0)}, ValueError, "expected two models or more, got 1"),
        (
            {"a": Result(0.0), "b": SimpleNamespace(elbo=1.0)},
            TypeError,
            r"'b': expected what fit or .* returns, got .*SimpleNamespace",
        ),
        (
            {"a": Result(math.nan), "b": Result(0.0)},
            ValueError,
            r"results\['a'\]: expected a finite log evidence, got nan. After a fit by",
        ),
    ],
)
def test_bad_results(results, error, words):
    with pytest.raises(error, match=words):
        compare(results)
