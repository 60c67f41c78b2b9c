# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Posterior draws from chains, and whether they can be trusted."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .._base.time_limit import abandonable
from ..diagnostics.checks import CORNER, Check, FailedCheck, Verdict, about_draws, as_lines
from ..diagnostics.convergence import ModeShares
from ..diagnostics.result_io import SavedResult
from ..model.sites import find_rounding
from ..model.symmetries import ROTATION, Symmetry
from ..posterior import Summary, predict, summary
from ..posterior.arviz import chains_to_inference_data
from .ensemble import Ensemble, StopReason
from .images import random_images
from .trajectories import energy_bfmi, share_of_divergent

_LOW_BFMI = 0.3  # Stan's threshold for E-BFMI


@dataclass(frozen=True, eq=False, repr=False)
class Chains(SavedResult):
    """Posterior draws from chains, and whether they can be trusted.

    Effective sample sizes follow ArviZ; they are by site, in the shape of the site on the unconstrained
    space. R-hat is the nested one of superchains, the groups of chains with a common starting point, since
    the R-hat of single short chains is larger.
    """

    #: all draws of each site, ``(num_chains * n,) + site shape``, one chain after another
    draws: dict[str, Tensor]
    #: the same draws, ``(num_chains, n) + site shape``; chains of a superchain are adjacent
    by_chain: dict[str, Tensor]
    ess: dict[str, Tensor]  #: bulk effective sample size, by site
    ess_tail: dict[str, Tensor]  #: effective sample size of the 5 and 95 % quantiles, by site
    rhat: dict[str, Tensor]  #: the nested R-hat, by site
    min_ess: float  #: the smallest bulk effective sample size
    max_rhat: float  #: the largest R-hat
    #: whether superchains agree, and there are as many effective draws as requested
    trusted: bool
    verdict: str  #: the verdict in words
    num_chains: int
    num_superchains: int
    num_gradients: int  #: gradients of the model's log density, including warm-up
    #: the number of trajectories after warm-up whose energy error exceeded 1,000 nats
    num_divergent: int
    acceptance: float  #: the mean acceptance probability
    #: the largest step size, approximately in posterior sds; those of single chains vary below it
    step_size: float
    bfmi: Tensor  #: the estimated Bayesian fraction of missing information of each chain
    seconds: float  #: wall time
    stopped_because: str  #: why the chains ended

    judged: Verdict  #: the verdict, in parts
    one_at_a_time: str = ""  #: why the model ran for one draw at a time; empty if it did not
    #: the symmetries of the posterior, found by its density. Unless chains mix over all images, draws are
    #: those of one image, to which R-hat and effective sample sizes refer
    symmetries: tuple[Symmetry, ...] = ()
    modes: ModeShares | None = None  #: the modes that chains found; ``None`` for one mode
    model: Any = None  #: the user's model; ``None`` after loading without it

    @property
    def ok(self) -> bool:
        """The same as ``trusted``, under the name that a :class:`~pyro_artransform.FitResult` has for it."""
        return self.trusted

    @property
    def failed(self) -> tuple[FailedCheck, ...]:
        """The failed checks, each with a sentence and a remedy."""
        return self.judged.failed

    @property
    def answer(self) -> str:
        """One line on whether the draws can be trusted."""
        if not self.trusted:
            return f"Draws trusted: no, {self.judged.num_failed}"
        return (
            f"Draws trusted: yes, {self.min_ess:,.0f} effective draws of the worst latent, R-hat at most "
            f"{self.max_rhat:.3f}"
        )

    @property
    def cost(self) -> str:
        """The number of gradients, and that of divergent trajectories if there are any, in words."""
        words = f"{self.num_gradients:,} gradients"
        if self.num_divergent:
            total = self.num_chains * next(iter(self.by_chain.values())).shape[1]
            words += f", {self.num_divergent:,} of {total:,} trajectories diverged"
        return words

    def rows(self) -> dict[str, str]:
        """The formatted numbers, by name."""
        size = next(iter(self.by_chain.values())).shape[1]
        rows = {
            "chains": f"{self.num_superchains} superchains of {self.num_chains // self.num_superchains} "
            f"chains, {size} draws each, {self.cost}",
            "steps": f"acceptance {self.acceptance:.2f}, E-BFMI at least {float(self.bfmi.min()):.2f}",
            "time": f"{self.seconds:.1f} s: {self.stopped_because}",
        }
        return rows | slow_row(self.one_at_a_time)

    def __repr__(self) -> str:
        return "\n".join([self.answer, *as_lines([*self.judged.rows(), *self.rows().items()])])

    def summary(self) -> Summary:
        """Mean, sd, 5, 50 and 95 % quantiles, both ESS and R-hat of each element, by constrained site.

        ESS and R-hat are those of the unconstrained space. A site with another shape there, such as a
        simplex, has its smallest ESS and its largest R-hat.
        """
        table = summary(self.draws)
        for name, columns in table.items():
            shape = columns["mean"].shape
            for key, values, worst in (
                ("ess_bulk", self.ess[name], torch.min),
                ("ess_tail", self.ess_tail[name], torch.min),
                ("r_hat", self.rhat[name], torch.max),
            ):
                if not values.numel():  # a constant, such as a simplex of one
                    values = values.new_tensor([torch.nan])
                fits = values.shape == shape
                columns[key] = values if fits else worst(values).expand(shape)
        return table

    def predict(self, *args: object, **kwargs: object) -> dict[str, Tensor]:
        """Predicts data at each of ``draws`` with :func:`~pyro_artransform.posterior.predict`.

        :param args: the arguments of the model: new ones to predict, those of the fit for predictive checks.
        :raises ValueError: if the model is missing, as after loading without it.
        """
        return predict(known(self.model), self.draws, *args, **kwargs)

    def with_model(self, model: Any) -> "Chains":
        """A copy with the model of the draws."""
        return replace(self, model=model)

    def to_inference_data(self, *args: object, **kwargs: object) -> Any:
        """Converts the draws to an ArviZ data set, as :func:`~pyro_artransform.posterior.to_inference_data`.

        Each ArviZ chain is a superchain, the concatenation of its chains: single chains are too short for
        ArviZ's R-hat.

        :param args: the arguments of the model.
        :return: the type that :func:`~pyro_artransform.posterior.to_inference_data` returns.
        :raises ImportError: if ArviZ is missing.
        :raises ValueError: if the model is missing, as after loading without it.
        """
        by_superchain = {
            name: value.unflatten(0, (self.num_superchains, -1)).flatten(1, 2)
            for name, value in self.by_chain.items()
        }
        return chains_to_inference_data(known(self.model), by_superchain, args, kwargs)


def slow_row(one_at_a_time: str) -> dict[str, str]:
    """The row that says why a model was run for one draw at a time, if it was."""
    words = f"the model was run one draw at a time ({one_at_a_time})"
    return {"slow": words} if one_at_a_time else {}


def known(model: Any) -> Any:
    """Returns the model; raises a ``ValueError`` if it is ``None``."""
    if model is None:
        raise ValueError("expected a model, got none, as in a file: use load(path, model)")
    return model


def chains_of(
    ensemble: Ensemble,
    num_samples: int,
    seconds: float,
    reason: str,
    prior_only: str,
    *,
    relabel: bool = True,
) -> Chains:
    """The draws of an ensemble with diagnostics and a verdict; ``reason`` is why time ran out, if so.

    :param prior_only: a sentence on why the posterior is the prior; empty if it is not.
    :param relabel: whether draws of a posterior with symmetries are those of the ensemble, or random images.
    """
    convergence, latents = ensemble.convergence(), ensemble.log_joint.latents
    count, size, dim = ensemble.draws.shape
    flat = ensemble.draws.reshape(-1, dim)
    if not relabel and ensemble.symmetries:
        flat = random_images(ensemble.symmetries, latents, flat)[0](flat)
    values = latents.constrain(flat)
    infos = ensemble.infos
    is_divergent = torch.stack([info.is_divergent for info in infos])
    bfmi = energy_bfmi(torch.stack([info.energy for info in infos], 1))
    median_bfmi = float(bfmi.median())
    modes = ensemble.mode_shares()
    of_draws = about_draws(prior_only, *find_rounding(latents, flat))
    judged = Verdict(
        failed=(*_objections(ensemble, modes, num_samples, median_bfmi), *of_draws),
        praise=(
            f"{float(convergence.bulk.min()):,.0f} effective draws of the worst latent, R-hat at most "
            f"{float(convergence.rhat.max()):.3f}, from {count} chains of {size} draws."
        ),
        notes=tuple(_notes(ensemble, modes, median_bfmi, relabel)),
        of="draws",
    )
    return Chains(
        draws=values,
        by_chain={k: v.reshape(count, size, *v.shape[1:]) for k, v in values.items()},
        ess=latents.split(convergence.bulk),
        ess_tail=latents.split(convergence.tail),
        rhat=latents.split(convergence.rhat),
        min_ess=float(convergence.bulk.min()),
        max_rhat=float(convergence.rhat.max()),
        trusted=judged.trusted,
        verdict=judged.words,
        judged=judged,
        num_chains=count,
        num_superchains=ensemble.num_superchains,
        num_gradients=ensemble.num_gradients,
        num_divergent=int(is_divergent.sum()),
        acceptance=float(torch.stack([info.acceptance for info in infos]).mean()),
        step_size=ensemble.step_size,
        bfmi=bfmi,
        seconds=seconds,
        stopped_because=reason or ensemble.end.value,
        one_at_a_time=ensemble.log_joint.reason,
        symmetries=ensemble.symmetries,
        modes=modes,
    )


def _objections(
    ensemble: Ensemble, modes: ModeShares | None, num_samples: int, bfmi: float
) -> Iterator[FailedCheck]:
    """The failed checks of the draws, with their remedies."""
    convergence, latents = ensemble.convergence(), ensemble.log_joint.latents
    max_rhat = float(convergence.rhat.max())
    is_apart = ensemble.end is StopReason.APART
    if modes is not None:
        between = f"{ensemble.num_single} of them were reached from one start only"
        yield from Check.MODES.apply(
            modes=str(modes),
            is_apart=is_apart,
            num_single=ensemble.num_single,
            between="chains do not move between them" if is_apart else between,
        )
    is_late = ensemble.end is StopReason.OUT_OF_TIME
    remedy = "Allow more time" if is_late else "Use tighter priors, or another parametrization"
    more = f"{remedy}, or ask for fewer draws"
    if bfmi < _LOW_BFMI:
        remedy = more = CORNER
    elif ensemble.end is StopReason.LIMIT:
        remedy = more = f"Set draws={num_samples}: without it, the chains of a fit end early"
    size, count = ensemble.num_trajectories, ensemble.draws.shape[1]
    if too_few := Check.WARM_UP.apply(num_trajectories=size, count=count):
        yield from too_few
        return
    if not (is_apart or convergence.has_mixed):
        with abandonable():
            yield from _causes(ensemble)
    if not is_apart:
        name = latents.name_of(int(convergence.rhat.argmax()))
        yield from Check.MIXING.apply(rhat=max_rhat, name=name, remedy=remedy)
    for ess, where in ((convergence.bulk, ""), (convergence.tail, " in the tails")):
        numbers = {"ess": float(ess.min()), "wanted": num_samples, "where": where, "remedy": more}
        yield from Check.ESS.apply(name=latents.name_of(int(ess.argmin())), **numbers)
    yield from Check.DIVERGENCES.apply(
        percent=100 * share_of_divergent(ensemble.infos), has_proposals=ensemble.has_proposals
    )
    beyond = ensemble.share_beyond()
    name, percent = latents.name_of(int(beyond.argmax())), 100 * float(beyond.max())
    yield from Check.TAIL.apply(name=name, percent=percent)


def _causes(ensemble: Ensemble) -> Iterable[FailedCheck]:
    """What can be seen of the reason why chains have not mixed."""
    acceptance = torch.stack([info.acceptance for info in ensemble.infos]).mean()
    jumps = Check.JUMPS.apply(acceptance=acceptance, has_jumps=ensemble.has_jumps)
    name_of = ensemble.log_joint.latents.name_of
    return jumps or Check.UNDETERMINED.apply(names=[name_of(i) for i in ensemble.undetermined()])


def _notes(
    ensemble: Ensemble, modes: ModeShares | None, bfmi: float, relabel: bool
) -> Iterable[str]:
    """Remarks that are not failed checks."""
    yield from _about_symmetries(ensemble, relabel)
    if modes is not None and ensemble.convergence().has_mixed:
        yield f"Chains move between {modes}; others may exist."
    if ensemble.left_out:
        yield (
            f"Some chains found other modes, with about {100 * ensemble.left_out:.3g} % of the posterior by "
            "a Gaussian approximation, and were restarted elsewhere."
        )
    # the eight schools in float32 have 0.01, a scale with a Normal prior has 0.3 and more
    if (outside := share_of_divergent(ensemble.infos, is_finite=False)) > 0.1:
        yield (
            f"{100 * outside:.3g} % of the trajectories ended where the log density is not finite, such as "
            "outside a support, or where numbers of the dtype overflow. If the model has a scale, use a "
            "prior on positive numbers, such as HalfNormal."
        )
    if bfmi < _LOW_BFMI:
        yield f"The median E-BFMI is {bfmi:.2f}: the chains explore the tails slowly."


def _about_symmetries(ensemble: Ensemble, relabel: bool) -> Iterable[str]:
    """The symmetries of the posterior, and what draws and single components mean."""
    draws, latents = ensemble.draws.flatten(0, 1), ensemble.log_joint.latents
    uncertainties = [0.0] * len(ensemble.symmetries)
    if (to_image := ensemble.to_image) is not None:
        uncertainties = to_image.uncertainties(latents.constrain(draws))
    for symmetry, uncertainty in zip(ensemble.symmetries, uncertainties):
        shown = "chains move between all images, and draws are of all of them"
        if to_image is not None:
            shown = f"draws are shown in {'one image' if relabel else 'random images'}"
        yield f"The posterior is the same under {symmetry}: {shown}."
        if symmetry.kind == ROTATION:
            names = " and ".join(name for name, _ in symmetry.slots)
            yield (
                f"Single entries of {names} have no meaning, but products along that dimension have, and "
                "R-hat is of these."
            )
        elif uncertainty > 0.01 and relabel:
            yield (
                f"Components overlap, since {100 * uncertainty:.3g} % of their labels are uncertain: "
                "marginals of single components mean little. Sorted components and predictions do not "
                "depend on labels."
            )
