# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Models of the same data compared by their evidence."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from .importance import GOOD_KHAT, KHAT_OF_VARIANCE


@runtime_checkable
class Evidence(Protocol):
    """A log evidence and whether to trust it, as the results of fits and of ``importance`` have it."""

    @property
    def log_evidence(self) -> float: ...

    @property
    def log_evidence_se(self) -> float: ...

    @property
    def khat(self) -> float: ...

    @property
    def trusted(self) -> bool: ...


class ComparedModel(NamedTuple):
    """A model in a comparison: its log evidence in nats, with its standard error, and

    :param difference: the log evidence less that of the model with the largest one, in nats.
    :param difference_se: its standard error; 0 for that model itself.
    :param probability: the posterior probability of the model where all are equally probable before.
    :param trusted: whether the posterior that the evidence is from can be trusted.
    """

    log_evidence: float
    log_evidence_se: float
    difference: float
    difference_se: float
    probability: float
    trusted: bool


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """What :func:`compare` returns; printed as a table.

    :param models: each model by its name, that with the largest evidence first.
    :param trusted: whether all of their posteriors can be.
    :param words: what can be concluded, and what speaks against it.
    """

    models: dict[str, ComparedModel]
    trusted: bool
    words: str

    def __repr__(self) -> str:
        width = max(map(len, ["model", *self.models]))
        head = f"{'log evidence':>14}{'se':>8}{'difference':>12}{'se':>8}{'probability':>13}"
        lines = [f"Comparison: {self.words}", f"  {'model':{width}}{head}{'trusted':>9}"]
        for name, model in self.models.items():
            cells = f"{model.log_evidence:14.3f}{model.log_evidence_se:8.3f}"
            cells += f"{model.difference:12.3f}{model.difference_se:8.3f}{model.probability:13.3f}"
            lines.append(f"  {name:{width}}{cells}{'yes' if model.trusted else 'no':>9}")
        return "\n".join(lines)


def compare(results: Mapping[str, Evidence]) -> Comparison:
    """Compares models of the same data by their evidence, the probability of the data.

    The evidence is that of importance sampling with each model's guide. It is too small, by an unknown
    amount, where the guide has missed a part of the posterior: a comparison with a result that is not
    trusted says so. It depends on the priors, which have to be meant; with an improper prior, or a
    ``pyro.factor`` that leaves a constant out, it does not exist. To compare predictions instead, give
    what ``inference.to_inference_data`` returns to ``arviz.compare``.

    :param results: for each model by its name what :func:`~pyro_artransform.fit` or
        :func:`~pyro_artransform.diagnostics.importance` has returned, for the same data.
    :raises TypeError: if it has something else.
    :raises ValueError: if there are fewer than two, or a log evidence is not finite, as that of a fit
        by mini-batches.

    Example::

        >>> import pyro, pyro.distributions as dist, torch
        >>> from pyro_artransform.diagnostics import compare, importance
        >>> def model(scale):
        ...     z = pyro.sample("z", dist.Normal(0.0, scale))
        ...     pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(0.5))
        >>> def guide(scale):
        ...     precision = 1 + 1 / scale**2
        ...     pyro.sample("z", dist.Normal(0.5 / precision, precision**-0.5))
        >>> scales = {"narrow": 1.0, "wide": 100.0}
        >>> compare({name: importance(model, guide, 1000, scale) for name, scale in scales.items()})
        Comparison: 'narrow' has the largest evidence, 4.196 ± 0.000 nats more than 'wide', a Bayes
        factor of 66.4.
          model   log evidence      se  difference      se  probability  trusted
          narrow        -1.328   0.000       0.000   0.000        0.985      yes
          wide          -5.524   0.000      -4.196   0.000        0.015      yes

    **References**

    1. Bayes Factors (Kass, Raftery, 1995), https://doi.org/10.1080/01621459.1995.10476572
    """
    if len(results) < 2:
        raise ValueError(f"results: expected two models or more, got {len(results)}")
    for name, found in results.items():
        if not isinstance(found, Evidence):
            raise TypeError(f"'{name}': expected what fit or importance returns, got {type(found)}")
        if not math.isfinite(found.log_evidence):
            raise ValueError(
                f"results['{name}']: expected a finite log evidence, got {found.log_evidence}. After a "
                "fit by mini-batches it is not known: run diagnostics.importance with all data"
            )
    ordered = sorted(results.items(), key=lambda item: -item[1].log_evidence)
    (_, best), models = ordered[0], {}
    total = sum(math.exp(found.log_evidence - best.log_evidence) for _, found in ordered)
    for name, found in ordered:
        evidence, se = found.log_evidence, found.log_evidence_se
        gap = evidence - best.log_evidence
        gap_se = 0.0 if found is best else math.hypot(se, best.log_evidence_se)
        share = math.exp(gap) / total
        models[name] = ComparedModel(evidence, se, gap, gap_se, share, found.trusted)
    words = _conclusion(models) + "".join(_objection(name, results[name]) for name in models)
    return Comparison(models, all(model.trusted for model in models.values()), words)


def _objection(name: str, found: Evidence) -> str:
    """What speaks against an evidence, after a space; empty where nothing does."""
    khat = f" k-hat of '{name}' is {found.khat:.2f}, above"
    if found.khat > GOOD_KHAT:
        return f"{khat} {GOOD_KHAT}: its evidence rests on a few draws, and is often too small."
    if not found.trusted:
        return (
            f" '{name}' is not trusted: see its verdict. Its evidence lacks what its guide missed."
        )
    if found.khat > KHAT_OF_VARIANCE:
        return f"{khat} {KHAT_OF_VARIANCE}: its standard error is too small."
    return ""


def _conclusion(models: Mapping[str, ComparedModel]) -> str:
    """What the two largest evidences say."""
    (first, one), (second, other) = list(models.items())[:2]
    gain = f"{-other.difference:.3f} ± {other.difference_se:.3f}"
    if not (one.trusted and other.trusted):
        begin = "No conclusion: of the two largest evidences not both can be relied on."
        return f"{begin} That of '{first}' seems to be {gain} nats above that of '{second}'."
    if -other.difference < 2 * other.difference_se:  # which is noise
        same = f"'{first}' and '{second}' have the same evidence as far as is known ({gain} nats)"
        return f"{same}: more draws of diagnostics.importance may tell."
    # a factor beyond the largest float is left out
    factor = f", a Bayes factor of {math.exp(-other.difference):.3g}" if other.probability else ""
    return f"'{first}' has the largest evidence, {gain} nats more than '{second}'{factor}."
