# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""What fits return."""

import math
from dataclasses import dataclass, field
from typing import Any

from ..diagnostics import Importance, Marginals
from ..diagnostics.importance import GOOD_KHAT
from ..diagnostics.marginals import bounds_in_words


@dataclass(frozen=True, eq=False, repr=False)
class FitResult:
    """A verdict on a posterior, with the numbers that it rests on. The posterior itself is ``guide``.

    After a fit by mini-batches the ELBO is the mean over the batches of one pass: that of all data,
    where the model scales its batches up, and otherwise that of a batch. Its standard error is from
    the draws, and from the batches that the pass has left out. What rests on the weights of all
    data, ``log_evidence``, ``khat`` and ``ess``, is ``nan`` unless the pass had all data, and the guide
    draws on the unconstrained space, as those of this package do.

    :param elbo: the evidence lower bound in nats, from draws that were not trained on.
    :param elbo_se: its standard error.
    :param log_evidence: the log evidence, by Pareto-smoothed importance sampling.
    :param log_evidence_se: its standard error, which is too small where ``khat`` exceeds 0.5, and nothing
        to go by where it exceeds 0.7: the evidence then is that of a few draws, most often too small.
    :param khat: the Pareto index of the importance weights.
    :param khat_se: its standard error.
    :param ess: the effective number of ``num_samples`` draws.
    :param num_samples: the number of draws behind these numbers.
    :param trusted: whether the verdict has no objection: k-hat, the standard error of the ELBO and its
        distance from the evidence are within the limits of ``EvaluationConfig``, neither draws around
        the guide nor other starts find mass elsewhere, few steps were skipped, and the fit ran to its
        end on all data.
    :param verdict: the same in words, and what to do where it is not trusted.
    :param history: the ELBO of each step, ``nan`` where the step was skipped.
    :param num_steps: the number of steps.
    :param num_skipped: how many of them were skipped, since the loss or its gradient was not finite.
    :param num_gradients: how many gradients of the model's log density the steps took.
    :param seconds: wall time of all of it.
    :param stopped_because: why the steps ended.
    :param start: the candidate that the guide was initialized with.
    :param end: which parameters it ended with: the last ones, their average, the best ones, or
        those that were saved on the way.
    :param step_size: the step size; ``None`` where the optimizer is the user's.
    :param culprits: the sites because of which steps were skipped, with the number of times.
    :param one_at_a_time: why the model was run for one draw after the other; empty where it was not.
    :param importance: the importance weights and what they say; ``None`` for a model that
        sub-samples its data.
    :param marginals_trusted: whether the mean and the sd of each single latent can be trusted;
        ``None`` where this was not checked. A fit to all data checks it by the weights where the joint is
        trusted; where these leave it open, from 30 latents on, by chains, if the model takes many draws
        at once.
    :param marginals: how far each of them is off; ``None`` where this was not checked.
    :param guide: the guide, that of the user or the one that the fit has chosen.
    :param guide_reason: why it has chosen this one; empty where the guide is the user's.
    """

    elbo: float
    elbo_se: float
    log_evidence: float
    log_evidence_se: float
    khat: float
    khat_se: float
    ess: float
    num_samples: int
    trusted: bool
    verdict: str
    history: list[float]
    num_steps: int
    num_skipped: int
    num_gradients: int
    seconds: float
    stopped_because: str
    start: str
    end: str
    step_size: float | None
    culprits: dict[str, int] = field(default_factory=dict)
    one_at_a_time: str = ""
    importance: Importance | None = None
    marginals_trusted: bool | None = None
    marginals: Marginals | None = None
    guide: Any = None  # what it offers beyond Pyro's interface depends on its class
    guide_reason: str = ""

    def rows(self) -> dict[str, str]:
        """The numbers in words, by name."""
        rows = {}
        if self.guide_reason:
            rows["guide"] = f"{type(self.guide).__name__}, {self.guide_reason}"
        rows["ELBO"] = f"{self.elbo:.3f} ± {self.elbo_se:.3f}"
        if not math.isnan(self.khat):
            evidence = f"{self.log_evidence:.3f} ± {self.log_evidence_se:.3f}"
            if self.khat > GOOD_KHAT:
                evidence += f" (most often too small: k-hat is above {GOOD_KHAT})"
            rows |= {
                "log evidence": evidence,
                "k-hat": f"{self.khat:.2f} ± {self.khat_se:.2f}",
                "ESS": f"{self.ess:.0f} of {self.num_samples}",
            }
        if (found := self.marginals) is not None:
            rows["marginals"] = bounds_in_words(found.mean_bound, found.sd_bound)
        rows["steps"] = f"{self.num_steps} in {self.seconds:.1f} s: {self.stopped_because}"
        rows["start"] = self.start
        if self.num_skipped:
            named = ", ".join(f"{name} ({count})" for name, count in self.culprits.items())
            rows["skipped"] = f"{self.num_skipped} steps, because of {named or 'sites unknown'}"
        if self.one_at_a_time:
            rows["slow"] = f"the model was run for one draw after the other ({self.one_at_a_time})"
        return rows

    def __repr__(self) -> str:
        lines = [f"  {name:13} {value}" for name, value in self.rows().items()]
        return "\n".join([f"FitResult: {self.verdict}", *lines])


@dataclass(frozen=True, eq=False, repr=False)
class DrawsResult:
    """How probable draws are that neither the steps nor their end depended on.

    :param log_likelihood: the mean log-density of these draws, in nats; of a guide on the constrained
        space, as ``guide.log_prob`` has it.
    :param log_likelihood_se: its standard error, for independent draws.
    :param num_held_out: the number of these draws.
    :param history: the mean log-density of the draws that said when to stop, at the start and at
        each check.
    :param num_steps: the number of steps.
    :param num_skipped: how many of them were skipped, as log-density or gradient was not finite.
    :param seconds: wall time of all of it.
    :param stopped_because: why the steps ended.
    :param start: where they began.
    """

    log_likelihood: float
    log_likelihood_se: float
    num_held_out: int
    history: list[float]
    num_steps: int
    num_skipped: int
    seconds: float
    stopped_because: str
    start: str

    def __repr__(self) -> str:
        held_out = f"{self.log_likelihood:.3f} ± {self.log_likelihood_se:.3f} nats a draw"
        lines = [
            f"DrawsResult: {held_out}, of {self.num_held_out} that were held out",
            f"  steps    {self.num_steps} in {self.seconds:.1f} s: {self.stopped_because}",
            f"  start    {self.start}",
        ]
        if self.num_skipped:
            lines.append(f"  skipped  {self.num_skipped} steps that were not finite")
        return "\n".join(lines)
