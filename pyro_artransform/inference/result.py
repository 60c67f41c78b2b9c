# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""What a fit returns."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from ..arguments import first_of, warn_user
from ..diagnostics import Importance, Marginals
from ..diagnostics.importance import GOOD_KHAT
from ..files import FilePath
from ..joint.density import Args, Kwargs
from ..posterior import Summary, predict, summary
from ..posterior.predictive import draws_of_guide
from .chains import Chains, known
from .evaluation.checks import Check, FailedCheck, Verdict, as_lines
from .evaluation.elements import Elements
from .saved import SavedResult

_NUM_DRAWS = 1000  # of a guide, where there are none of chains


@dataclass(frozen=True, eq=False, repr=False)
class FitResult(SavedResult):
    """A verdict on a posterior, with the numbers that it rests on. The posterior itself is ``guide``.

    After a fit by mini-batches the ELBO is the mean over the batches of one pass: that of all data,
    where the model scales its batches up, and otherwise that of a batch. Its standard error is from the
    draws, and from batches that the pass has left out. ``log_evidence``, ``khat`` and ``ess`` are ``nan``
    unless the pass had all data, and the guide draws on the unconstrained space, or has latents of the
    elements of each batch, see ``elements``.
    """

    elbo: float  #: the evidence lower bound in nats, from draws that were not trained on
    elbo_se: float  #: its standard error
    log_evidence: float  #: the log evidence, by Pareto-smoothed importance sampling
    #: its standard error, too small where ``khat`` exceeds 0.5; above 0.7 the evidence is that of a few
    #: draws, most often too small
    log_evidence_se: float
    khat: float  #: the Pareto index of the importance weights
    khat_se: float  #: its standard error
    ess: float  #: the effective number of ``num_samples`` draws
    num_samples: int  #: the number of draws behind these numbers
    trusted: bool  #: whether no check of the guide failed, see ``failed``
    verdict: str  #: the same in words, and what to do where it is not trusted
    history: list[float]  #: the ELBO of each step, ``nan`` where the step was skipped
    num_steps: int  #: the number of steps
    num_skipped: int  #: steps that were skipped, since the loss or its gradient was not finite
    num_gradients: int  #: gradients of the model's log density that the steps took
    seconds: float  #: wall time of the whole fit
    stopped_because: str  #: why the steps ended
    start: str  #: the candidate that the guide was initialized with
    #: the sites because of which steps were skipped, with the number of times
    culprits: dict[str, int] = field(default_factory=dict)
    point_estimates: tuple[str, ...] = ()  #: the parameters of the model that were trained as well
    one_at_a_time: str = ""  #: why the model was run for one draw after the other, if it was
    #: the importance weights; ``None`` for a model that sub-samples its data
    importance: Importance | None = None
    #: whether the mean and the sd of each single latent can be trusted, by draws of chains that have mixed;
    #: ``None`` without them
    marginals_trusted: bool | None = None
    marginals: Marginals | None = None  #: how far each of them is off; ``None`` without chains
    #: how close the guide is to each element of a plate, of a fit by mini-batches with latents of their own
    #: elements; then ``log_evidence``, ``khat``, ``ess`` and ``importance`` are of what all share
    elements: Elements | None = None
    #: how centred latents with coordinates from the prior are, by site: 0 in units of the prior, 1 as the
    #: model is written; empty where all are as it is written
    coordinates: dict[str, Tensor] = field(default_factory=dict)
    #: draws of the posterior by chains, each ``(draws,) + site shape``, of a model of all data. The verdict
    #: begins with them, and ``trusted`` is about the guide alone, which is not trained where ``draws=`` asked
    #: for draws and chains from the prior have them
    draws: dict[str, Tensor] | None = None
    chains: Chains | None = None
    guide: Any = None  #: that of the user, or the one that the fit has chosen
    guide_class: str = ""  #: the name of its class
    guide_reason: str = ""  #: why it has chosen this one
    model: Any = None  #: the model, as it was given; ``None`` after a load without it
    judged: Verdict = field(default_factory=Verdict)  #: the verdict on the guide in its parts

    @property
    def ok(self) -> bool:
        """Whether the posterior can be trusted: by its draws, where there are some, else by the guide."""
        return self.trusted if self.chains is None else self.chains.trusted

    @property
    def failed(self) -> tuple[FailedCheck, ...]:
        """The checks that failed of what ``ok`` is about; those of the guide alone are ``judged.failed``."""
        return self.judged.failed if self.chains is None else self.chains.failed

    def summary(self, *args: object, **kwargs: object) -> Summary:
        """Mean, sd and quantiles of 5, 50 and 95 % of each element: a table, and a dict of tensors.

        They are those of all draws by chains, with ess and R-hat, or, where there are none, of 1,000 fresh
        draws of the guide.

        :param args: the arguments of the guide, where its draws need some.
        :raises ValueError: if there is neither, as after a load.
        """
        if self.chains is not None:
            return self.chains.summary()
        return summary(self._drawn(args, kwargs))

    def predict(self, *args: object, **kwargs: object) -> dict[str, Tensor]:
        """Data at each of ``draws``, as by :func:`~pyro_artransform.posterior.predict`.

        Without these they are at 1,000 draws of the guide. Where such draws need arguments, as those of
        ``AutoAmortized``, give them to that function.

        :param args: the arguments of the model, new ones for predictions, or those of the fit for checks.
        :raises ValueError: if the model is not known, as after a load without it, or there are neither draws
            nor a guide.
        """
        draws = self._drawn() if self.draws is None else self.draws
        return predict(known(self.model), draws, *args, **kwargs)

    def _drawn(self, args: Args = (), kwargs: Kwargs | None = None) -> dict[str, Tensor]:
        if self.guide is None:
            raise ValueError(
                f"{self.guide_class or 'guide'}: expected it beside the verdict, since there are no draws: "
                "load it, and give its draws to inference.summary or inference.predict"
            )
        return draws_of_guide(self.guide, _NUM_DRAWS, args, kwargs or {})

    def save(self, path: FilePath) -> None:
        """See :meth:`SavedResult.save`; it warns where the model has parameters, which no file has."""
        if self.point_estimates:
            warn_user(
                f"the file has no parameters of the model, {first_of(self.point_estimates)}, without which "
                "predictions are others: pyro.get_param_store().save(path), or a state_dict, has them",
                UserWarning,
            )
        super().save(path)

    def with_model(self, model: Any) -> "FitResult":
        """The same result, with the model that it is of."""
        chains = None if self.chains is None else self.chains.with_model(model)
        return replace(self, model=model, chains=chains)

    def rows(self) -> dict[str, str]:
        """The numbers in words, by name."""
        rows = {}
        if self.guide_reason:
            rows["guide"] = f"{self.guide_class}, {self.guide_reason}"
        rows["ELBO"] = f"{self.elbo:.3f} ± {self.elbo_se:.3f}"
        if not math.isnan(self.khat):
            evidence = f"{self.log_evidence:.3f} ± {self.log_evidence_se:.3f}"
            khat, weights = f"{self.khat:.2f} ± {self.khat_se:.2f}", self.importance
            of = "" if self.elements is None else ", of what all elements share"
            if any(failed.check is Check.LOST_MODES for failed in self.judged.failed):
                evidence += " (of the modes that the guide has)"
            if self.khat > GOOD_KHAT:
                if weights is None or weights.has_heavy_tail:
                    evidence += f" (most often too small: k-hat is above {GOOD_KHAT})"
                else:
                    share = f"{100 * weights.tail_share:.1g} % of the weight"
                    khat += f" of {share}, too little to matter"
            rows |= {
                "log evidence": evidence,
                "k-hat": khat + of,
                "ESS": f"{self.ess:.0f} of {self.num_samples}{of}",
            }
        if about := self.judged.marginals:
            about = about.removeprefix("Marginals ").removeprefix("Single latents were ")
            rows["marginals"] = about.removesuffix(".")
        if self.chains is not None:
            found = self.chains
            rows["chains"] = (
                f"{found.min_ess:,.0f} effective draws at least, R-hat at most {found.max_rhat:.3f}, "
                f"{found.num_gradients:,} gradients"
            )
        rows["steps"] = f"{self.num_steps} in {self.seconds:.1f} s: {self.stopped_because}"
        rows["start"] = self.start
        if self.coordinates:
            words = []
            for name, centered in self.coordinates.items():
                least, most = f"{centered.min():.2f}", f"{centered.max():.2f}"
                words.append(f"{name} {least}" + ("" if least == most else f" to {most}"))
            rows["coordinates"] = f"0: of the prior, 1: of the model; {first_of(words)}"
        if self.num_skipped:
            named = ", ".join(f"{name} ({count})" for name, count in self.culprits.items())
            rows["skipped"] = f"{self.num_skipped} steps, because of {named or 'sites unknown'}"
        if self.one_at_a_time:
            rows["slow"] = f"the model was run for one draw after the other ({self.one_at_a_time})"
        return rows

    def __repr__(self) -> str:
        judged, chains = self.judged, self.chains
        if chains is None:
            told = tuple[FailedCheck, ...]()
            lines = [f"Guide trusted: {'yes' if self.trusted else f'no, {judged.num_failed}'}"]
        else:
            told, lines = chains.failed, [chains.answer, *as_lines(chains.judged.rows())]
            rest = ", on which the draws do not rest" if chains.trusted else ""
            answer = "trusted" if self.trusted else f"not trusted, {judged.num_failed}"
            lines.append(f"About the guide alone{rest}: {answer}")
        why = [("why", judged.praise.removesuffix("."))] if self.trusted else []
        rows = [*why, *judged.rows(without=told), *self.rows().items()]
        return "\n".join([*lines, *as_lines(rows)])
