# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The result of a fit."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from .._base.arguments import first_of, warn_user
from .._base.files import FilePath
from ..diagnostics import Importance, Marginals
from ..diagnostics.checks import Check, FailedCheck, Verdict, as_lines
from ..diagnostics.convergence import ModeShares
from ..diagnostics.importance_sampling import GOOD_KHAT
from ..diagnostics.plates import ElementDiagnostics, PlateDiagnostics
from ..diagnostics.result_io import SavedResult
from ..model.density import Args, Kwargs
from ..model.symmetries import Symmetry
from ..posterior import Summary, predict, summary, to_inference_data
from ..posterior.predictive import draws_of_guide
from ..sampling.chains import Chains, known, slow_row

_NUM_DRAWS = 1000  # draws of the guide, if there are none from chains


@dataclass(frozen=True, eq=False, repr=False)
class FitResult(SavedResult):
    """A verdict on a posterior, with the numbers behind it. The posterior itself is ``guide``.

    After a fit with mini-batches the ELBO is the mean over the batches of one pass: the ELBO of all data if
    the model scales its batches up, and of a single batch otherwise. Its standard error covers the draws and
    batches that the pass left out. ``log_evidence``, ``khat`` and ``ess`` are ``nan`` unless the pass had
    all data and the guide either draws on the unconstrained space or has latents for the elements of each
    batch, see ``elements``.
    """

    elbo: float  #: the evidence lower bound in nats, from draws not used in training
    elbo_se: float  #: standard error of ``elbo``
    log_evidence: float  #: the log evidence, by Pareto-smoothed importance sampling
    #: standard error of ``log_evidence``, too small if ``khat`` exceeds 0.5; above 0.7 the evidence rests on
    #: a few draws and is usually too small
    log_evidence_se: float
    khat: float  #: the Pareto index of the importance weights
    khat_se: float  #: standard error of ``khat``
    ess: float  #: effective sample size, out of ``num_samples``
    num_samples: int  #: the number of draws behind these numbers
    trusted: bool  #: whether the guide passed all checks, see ``failed``
    verdict: str  #: the verdict in words, with a remedy if the guide is not trusted
    history: list[float]  #: the ELBO of each step, ``nan`` if the step was skipped
    num_steps: int  #: the number of steps
    num_skipped: int  #: steps skipped because the loss or its gradient was not finite
    num_gradients: int  #: gradients of the model's log density in all steps
    seconds: float  #: wall time of the whole fit
    stopped_because: str  #: why the steps ended
    start: str  #: the candidate chosen to initialize the guide
    #: the sites that caused steps to be skipped, with the number of steps
    culprits: dict[str, int] = field(default_factory=dict)
    point_estimates: tuple[str, ...] = ()  #: the trained parameters of the model
    one_at_a_time: str = ""  #: why the model ran for one draw at a time; empty if it did not
    #: the importance weights; ``None`` if the density of all data is not known
    importance: Importance | None = None
    #: whether the mean and the sd of each latent can be trusted, judged by draws of chains that have mixed;
    #: ``None`` without such chains
    marginals_trusted: bool | None = None
    marginals: Marginals | None = None  #: errors of means and sds; ``None`` without such chains
    #: by plate, how close the guide is to the posterior of each element: by importance weights, if batches
    #: have latents of their own; ``log_evidence``, ``khat``, ``ess`` and ``importance`` then concern the
    #: shared latents. If rows of batches index latents in plates, it is given all other latents, which does
    #: not show an error that all elements of a plate share
    elements: dict[str, ElementDiagnostics] = field(default_factory=dict)
    #: by site, how centered the latents with coordinates from the prior are: 0 for non-centered, 1 for the
    #: model as written; empty if all latents are as written
    coordinates: dict[str, Tensor] = field(default_factory=dict)
    #: all draws of the posterior that chains kept, each ``(n,) + site shape``, for a model of all data. The
    #: verdict begins with them; ``trusted`` is about the guide alone
    draws: dict[str, Tensor] | None = None
    chains: Chains | None = None
    #: the number of images of a posterior with symmetries, if the guide has one of them: ``elbo`` and
    #: ``log_evidence`` are of that image, and its logarithm is to be added for the whole posterior
    num_images: float = 1.0
    #: the modes of the posterior, by a flow for each if the fit chose the guide; ``None`` for one mode
    modes: ModeShares | None = None
    guide: Any = None  #: the user's guide, or the one chosen by the fit
    guide_class: str = ""  #: the class name of the guide
    guide_reason: str = ""  #: why the fit chose this guide
    model: Any = None  #: the user's model; ``None`` after loading without it
    judged: Verdict = field(default_factory=Verdict)  #: the verdict on the guide, in parts

    @property
    def ok(self) -> bool:
        """Whether the posterior can be trusted: judged by its draws if there are any, else by the guide."""
        return self.trusted if self.chains is None else self.chains.trusted

    @property
    def symmetries(self) -> tuple[Symmetry, ...]:
        """The symmetries of the posterior, found by its density; empty without chains."""
        return () if self.chains is None else self.chains.symmetries

    @property
    def failed(self) -> tuple[FailedCheck, ...]:
        """The failed checks behind ``ok``; those of the guide alone are ``judged.failed``."""
        return self.judged.failed if self.chains is None else self.chains.failed

    def summary(self, *args: object, **kwargs: object) -> Summary:
        """Mean, sd and 5, 50 and 95 % quantiles of each element, as a table and a dict of tensors.

        They are computed from all draws of the chains, with ESS and R-hat, or, without chains, from 1,000
        fresh draws of the guide.

        :param args: the arguments of the guide, if its draws need any.
        :raises ValueError: if there are neither chains nor a guide, as after loading.
        """
        if self.chains is not None:
            return self.chains.summary()
        return summary(self._drawn(args, kwargs))

    def predict(self, *args: object, **kwargs: object) -> dict[str, Tensor]:
        """Predicts data at each of ``draws`` with :func:`~pyro_artransform.posterior.predict`.

        Without ``draws`` it uses 1,000 draws of the guide. If these need arguments, as for
        ``AutoAmortized``, pass draws to that function instead.

        :param args: the arguments of the model: new ones to predict, those of the fit for predictive checks.
        :raises ValueError: if the model is missing, as after loading without it, or there are neither draws
            nor a guide.
        """
        draws = self._drawn() if self.draws is None else self.draws
        return predict(known(self.model), draws, *args, **kwargs)

    def to_inference_data(self, *args: object, **kwargs: object) -> Any:
        """Converts ``draws``, or 1,000 draws of the guide without chains, to an ArviZ data set.

        See :func:`~pyro_artransform.posterior.to_inference_data` and
        :meth:`~pyro_artransform.sampling.Chains.to_inference_data`.

        :param args: the arguments of the model.
        :raises ImportError: if ArviZ is missing.
        :raises ValueError: as for :meth:`predict`.
        """
        if self.chains is not None:
            return self.chains.to_inference_data(*args, **kwargs)
        model, guide = known(self.model), self._known_guide()
        return to_inference_data(model, guide, _NUM_DRAWS, *args, **kwargs)

    def _drawn(self, args: Args = (), kwargs: Kwargs | None = None) -> dict[str, Tensor]:
        return draws_of_guide(self._known_guide(), _NUM_DRAWS, args, kwargs or {})

    def _known_guide(self) -> Any:
        if self.guide is None:
            raise ValueError(
                f"{self.guide_class or 'guide'}: expected a guide or draws, got only a verdict: load the "
                "guide, and pass its draws to posterior.summary or posterior.predict"
            )
        return self.guide

    def save(self, path: FilePath) -> None:
        """As :meth:`~pyro_artransform.sampling.Chains.save`; warns of parameters that the model has."""
        if self.point_estimates:
            warn_user(
                f"the file does not contain the parameters of the model, {first_of(self.point_estimates)}, "
                "on which predictions depend: save them with pyro.get_param_store().save(path), or as a "
                "state_dict",
                UserWarning,
            )
        super().save(path)

    def with_model(self, model: Any) -> "FitResult":
        """A copy of the result with its model."""
        chains = None if self.chains is None else self.chains.with_model(model)
        return replace(self, model=model, chains=chains)

    def rows(self) -> dict[str, str]:
        """The formatted numbers, by name."""
        rows = {}
        if self.guide_reason:
            rows["guide"] = f"{self.guide_class}, {self.guide_reason}"
        rows["ELBO"] = f"{self.elbo:.3f} ± {self.elbo_se:.3f}"
        if not math.isnan(self.khat):
            evidence = f"{self.log_evidence:.3f} ± {self.log_evidence_se:.3f}"
            khat, weights = f"{self.khat:.2f} ± {self.khat_se:.2f}", self.importance
            has_own = any(isinstance(e, PlateDiagnostics) for e in self.elements.values())
            of = ", for the shared latents" if has_own else ""
            if 1 < (count := self.num_images) < math.inf:
                evidence += f" (of one of {count:,.0f} images: add {math.log(count):.3f} for all)"
            if any(failed.check is Check.LOST_MODES for failed in self.judged.failed):
                evidence += " (only of the modes that the guide covers)"
            if self.khat > GOOD_KHAT:
                if weights is None or weights.has_heavy_tail:
                    evidence += f" (unreliable: k-hat is above {GOOD_KHAT})"
                else:
                    share = f"{100 * weights.tail_share:.1g} % of the weight"
                    khat += f" (its tail has {share}, which is negligible)"
            rows |= {
                "log evidence": evidence,
                "k-hat": khat + of,
                "ESS": f"{self.ess:.0f} of {self.num_samples}{of}",
            }
        if self.elements:
            rows["elements"] = "; ".join(element.count for element in self.elements.values())
        if about := self.judged.marginals:
            about = about.removeprefix("Marginals ")
            rows["marginals"] = about.removesuffix(".")
        if self.chains is not None:
            chains = self.chains
            rows["chains"] = (
                f"at least {chains.min_ess:,.0f} effective draws, R-hat at most {chains.max_rhat:.3f}, "
                f"{chains.cost}"
            )
        rows["steps"] = f"{self.num_steps} in {self.seconds:.1f} s: {self.stopped_because}"
        rows["start"] = self.start
        if self.coordinates:
            words = []
            for name, centered in self.coordinates.items():
                least, most = f"{centered.min():.2f}", f"{centered.max():.2f}"
                words.append(f"{name} {least}" + ("" if least == most else f" to {most}"))
            rows["coordinates"] = f"0: non-centred, 1: as in the model; {first_of(words)}"
        if self.num_skipped:
            named = ", ".join(f"{name} ({count})" for name, count in self.culprits.items())
            rows["skipped"] = f"{self.num_skipped} steps, because of {named or 'unknown sites'}"
        return rows | slow_row(self.one_at_a_time)

    def __repr__(self) -> str:
        judged, chains = self.judged, self.chains
        if chains is None:
            shown = tuple[FailedCheck, ...]()
            lines = [f"Guide trusted: {'yes' if self.trusted else f'no, {judged.num_failed}'}"]
        else:
            shown, lines = chains.failed, [chains.answer, *as_lines(chains.judged.rows())]
            rest = " (the draws do not depend on it)" if chains.trusted else ""
            answer = "trusted" if self.trusted else f"not trusted, {judged.num_failed}"
            lines.append(f"About the guide alone{rest}: {answer}")
        why = [("why", judged.praise.removesuffix("."))] if self.trusted else []
        rows = [*why, *judged.rows(after=shown), *self.rows().items()]
        return "\n".join([*lines, *as_lines(rows)])
