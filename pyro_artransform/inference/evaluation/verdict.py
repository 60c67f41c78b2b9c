# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The verdict on a posterior in words, from the thresholds of trust."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, cast

import torch

from ..._base.arguments import first_of
from ..._base.time_limit import INTERRUPTED, OUT_OF_TIME, abandonable
from ...diagnostics import Importance, Marginals
from ...diagnostics.checks import Check, FailedCheck, Verdict, about_draws
from ...diagnostics.convergence import ModeShares
from ...diagnostics.importance_sampling import GOOD_KHAT, GOOD_TAIL
from ...diagnostics.plates import ElementDiagnostics
from ...diagnostics.psis import round_off_of
from ...sampling import Ensemble
from ..optimization.schedule import FILLED, LIMIT, STOPPED, Schedule
from .elements import ElementWeights

_ELSEWHERE = {
    True: ", and chains found no other modes.",
    False: ", but other modes were not searched for.",
}


class FitStatus(NamedTuple):
    """How a fit ended, and properties of its guide and model."""

    skipped_share: float = 0.0  #: the share of skipped steps
    is_interrupted: bool = False  #: whether Ctrl-C, the time limit or the callback ended it
    #: why steps ended before their end, or before the ELBO settled
    cut_short: FailedCheck | None = None
    remedy: str = ""  #: the remedy if the guide is not the posterior, if known
    is_point: bool = False  #: whether the guide has a single value at some site
    is_random: bool = False  #: whether the model draws mini-batches itself, or is random otherwise
    mixes_draws: bool = False  #: whether the model turned out to mix draws evaluated at once
    #: finds dependencies of the posterior that the guide's graph lacks, in words
    missing: Callable[[], Sequence[str]] = tuple
    coarse: Sequence[str] = ()  #: the sites whose draws are barely resolved by their dtype
    at_edge: Sequence[str] = ()  #: the sites whose draws reach the edge of what their dtype holds
    point_estimates: Sequence[str] = ()  #: the trained parameters of the model
    start_failed: bool = False  #: whether initialization failed and left the guide unchanged
    no_chains: str = ""  #: why no chain could start, although chains were wanted; else empty
    modes: ModeShares | None = None  #: the mass of the guide's components, if it is a mixture
    prior_only: str = ""  #: a sentence on why the posterior is the prior; empty if it is not


class LostModes(NamedTuple):
    """Modes of a posterior in which a guide has almost no draws."""

    lost_mass: float = 0.0  #: their share of the posterior
    num_lost: int = 0  #: the number of lost modes
    was_searched: bool = False  #: whether chains started all over the prior, to find other modes
    #: the check that such chains failed, if they had enough time but are far from mixed
    unmixed: tuple[FailedCheck, ...] = ()


NOT_SEARCHED = LostModes()


def judge(
    status: FitStatus,
    weights: Importance | None = None,
    lost: LostModes = NOT_SEARCHED,
    marginals: Marginals | None = None,
    *,
    about_others: Iterable[FailedCheck] = (),
    praise: str = "",
) -> Verdict:
    """The verdict on a fit; if steps were cut short, that comes first.

    :param weights: the importance weights of the guide's draws; ``None`` with mini-batches.
    :param marginals: errors of the guide's means and sds, if chains have mixed.
    :param about_others: failed checks on mini-batches.
    :param praise: the sentence if no check failed; by default it is about the weights.
    """
    failed = [
        *Check.SKIPPED.apply(percent=100 * status.skipped_share),
        *Check.NO_CHAINS.apply(reason=status.no_chains),
        *about_draws(status.prior_only, status.coarse, status.at_edge),
    ]
    if status.is_point or status.is_random:
        failed.append((Check.POINT if status.is_point else Check.SUBSAMPLED).failed())
    elif weights is not None:
        own = None if status.cut_short else ""
        about_lost = Check.LOST_MODES.apply(
            percent=100 * lost.lost_mass, count=lost.num_lost, remedy=own
        )
        # neither another guide nor more draws help against lost modes
        failed += about_weights(weights, "" if about_lost else status.remedy)
        off = Check.MARGINALS.apply(found=marginals, remedy=_use(status.remedy))
        failed += about_lost or off
        if not status.cut_short:
            failed += lost.unmixed
    failed += about_others
    late = "time was over before the guide's graph was compared with the posterior"
    about_graph = [Check.CUT_SHORT.failed(reason=late, remedy="increase max_seconds")]
    with abandonable():
        about_graph = [*Check.GRAPH.apply(names=status.missing())]
    failed += about_graph
    # no other check judges the parameters of a model
    is_unfinished = failed or status.is_interrupted or status.point_estimates
    if status.cut_short and is_unfinished:
        failed.insert(0, status.cut_short)
    if not (failed or praise):
        praise = _about_success(cast(Importance, weights), lost)
    return Verdict(tuple(failed), praise, tuple(_notes(status)))


def about_end(schedule: Schedule, losses: Sequence[float]) -> FailedCheck | None:
    """The failed check if steps ended early or before the ELBO settled, with a remedy; else ``None``.

    :param losses: the losses of all steps.
    """
    reason = schedule.reason
    more_time = "increase max_seconds"
    hints = {INTERRUPTED: "fit again", OUT_OF_TIME: more_time, STOPPED: "let it continue"}
    if reason in hints:
        reason, remedy = f"{reason} after step {len(losses):,}", hints[reason]
    elif schedule.is_still(losses[: schedule.decay_start]):
        return None
    elif schedule.num_steps is not None:
        remedy = "set a larger number, or none, so that fit chooses it"
    elif reason in (FILLED, LIMIT):
        remedy = more_time if reason == FILLED else "set a larger num_steps"
    else:
        return None
    return Check.CUT_SHORT.failed(reason=reason, remedy=remedy)


def _notes(status: FitStatus) -> Iterator[str]:
    """Remarks that are not failed checks."""
    if status.mixes_draws:
        yield (
            "The model has a different density for many draws at once than for one at a time: the guide was "
            "trained with the former, and the numbers here use the latter. Write it without branches on "
            "values of latents (torch.where), and fit again."
        )
    if status.start_failed:
        yield (
            "Initialization failed, since no Gaussian around a starting point has a finite ELBO: the guide "
            "started from its own initial values."
        )
    if status.modes is not None:
        yield f"The guide has a flow for each of {status.modes}; others may exist."
    if status.point_estimates:
        names = first_of(status.point_estimates)
        yield f"The model's own parameters are point estimates ({names}): the verdict is conditional on them."


def about_weights(found: Importance, remedy: str) -> Iterator[FailedCheck]:
    """The failed checks of the importance weights of a guide."""
    counts = {"count": found.num_nonfinite, "num_samples": found.num_samples}
    if not_finite := Check.DENSITY.apply(**counts):
        yield from not_finite
        return
    dtype, khat = found.log_weights.dtype, {"khat": found.khat, "khat_se": found.khat_se}
    round_off, of_mean = round_off_of(found.log_weights), torch.finfo(dtype).eps * abs(found.elbo)
    rounded = Check.ROUND_OFF.apply(
        **khat,
        round_off=round_off,
        of_mean=of_mean,
        dtype=dtype,
        nats=max(round_off, of_mean),
        elbo=found.elbo,
        remedy="tighter priors" if dtype == torch.float64 else "float64",
    )
    use = None if rounded else _use(remedy)
    yield from rounded or Check.KHAT.apply(
        **khat, has_heavy_tail=found.has_heavy_tail, borderline=_borderline(found), remedy=use
    )
    yield from Check.ELBO_NOISE.apply(elbo_se=found.elbo_se, remedy=use)
    yield from Check.GAP.apply(gap=found.log_evidence - found.elbo, remedy=use)


def _use(remedy: str) -> str | None:
    return f"Use {remedy}" if remedy else None


def _borderline(found: Importance) -> str:
    """A remark on a k-hat within one standard error of its threshold."""
    is_borderline = abs(found.khat - GOOD_KHAT) <= found.khat_se
    return " (borderline, within one standard error)" if is_borderline else ""


def about_marginals(found: Marginals | None, ensemble: Ensemble | None) -> str:
    """A sentence on the marginals, or on why they were not checked."""
    if found is not None:
        unclear = "not trusted" if found.is_off else "inconclusive"
        return f"Marginals {'trusted' if found.trusted else unclear}: {found.words}."
    reason = "there are no chains"
    if ensemble is not None:
        reason = "chains have not mixed"
        if ensemble.convergence().has_mixed:
            reason = "the guide has a point mass or draws that are not finite"
    return f"Marginals not checked, since {reason}."


def about_plate(found: ElementDiagnostics, remedy: str) -> tuple[FailedCheck, ...]:
    """The failed check of the elements of a plate; none if all are trusted."""
    return Check.ELEMENTS.apply(found=found.objection, remedy=remedy or None)


def about_elements(found: ElementWeights, remedy: str) -> Iterator[FailedCheck]:
    """The failed checks of a fit with mini-batches and latents of their elements; none if all are trusted.

    The accepted noise of log weights is about the optimal one for pseudo-marginal chains. See Efficient
    Implementation of Markov Chain Monte Carlo When Using an Unbiased Likelihood Estimator (Doucet, Pitt,
    Deligiannidis, Kohn, 2015), https://arxiv.org/abs/1210.1871
    """
    failed = about_plate(found.elements, remedy)
    failed = failed or Check.ELEMENT_NOISE.apply(
        count=found.num_inner, noise=found.noise, remedy=remedy or None
    )
    if failed or found.shared is None:
        yield from failed
    else:
        yield from about_weights(found.shared, remedy)


def about_good_elements(found: ElementWeights) -> str:
    """The sentence on a fit with latents of elements, if all of them are trusted."""
    elements, words, why = found.elements, "", ""
    worst = int(elements.khat.argmax())
    if elements.khat[worst] > GOOD_KHAT:
        why = "as expected by chance for the largest of so many"
        if elements.tail_share[worst] <= GOOD_TAIL:
            why = "with a tail of negligible weight"
        why = f" (above {GOOD_KHAT}, {why})"
    if (shared := found.shared) is not None:
        words = f"for the shared latents, {_numbers(shared)}; "
    return (
        f"{words}for each of {len(elements.khat):,} elements of plate '{elements.plate}', the ELBO is at "
        f"most {elements.gap.max():.3f} nats below its log evidence, and the largest k-hat is "
        f"{elements.khat[worst]:.2f}{why}{_ELSEWHERE[False]}"
    )


def _numbers(found: Importance) -> str:
    gap = max(found.log_evidence - found.elbo, 0.0)
    below = f"the ELBO is {gap:.3f} nats below the log evidence {found.log_evidence:.3f}"
    return f"{below}, k-hat is {found.khat:.2f} ± {found.khat_se:.2f}"


def _about_success(found: Importance, lost: LostModes) -> str:
    words = _numbers(found)
    if not found.has_good_khat:
        share = f"{100 * found.tail_share:.1g} % of the weight"
        words += f" (its tail has {share}, which is negligible)"
    else:
        words += _borderline(found)
    if lost.num_lost:
        return (
            f"{words}, but about {100 * lost.lost_mass:.0f} % of the posterior is in {lost.num_lost} other "
            "mode(s) that the guide misses."
        )
    return words + _ELSEWHERE[lost.was_searched]
