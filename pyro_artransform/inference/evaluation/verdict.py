# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The verdict on a posterior in words, by the bounds of trust."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, cast

import torch

from ...arguments import first_of
from ...diagnostics import Importance, Marginals
from ...diagnostics.importance import GOOD_ELBO_SE, GOOD_GAP, GOOD_KHAT, GOOD_LOST_MASS, GOOD_TAIL
from ...diagnostics.psis import WORST_KHAT, round_off_of
from ...sampling import Ensemble
from ..optimization.minibatches import PassEstimate
from ..prior_only import GIVE_DATA
from .elements import ElementWeights

_MOST_SKIPPED = 0.1  # of the steps
_MOST_NOISE = 1.0  # of log weights, a variance
_POINT = (
    "the guide is a point at some site, as AutoDelta is (and AutoLaplaceApproximation before its "
    "laplace_approximation): an estimate of the mode, and no posterior. Use AutoIAF"
)
_ELSEWHERE = {
    True: ", and restarts found no other modes.",
    False: ", but other modes were not searched for.",
}
BREAK_SYMMETRY = "Break the symmetry in the model (ordered supports, tighter priors)"
_SUBSAMPLED = (
    "the model sub-samples its data, or is random otherwise, so that the numbers below rest on the "
    "noisy density of mini-batches: the ELBO is right but for noise, k-hat and the evidence mean nothing. "
    "Run diagnostics.importance with a model that sees all data"
)
_SUM_NOT_CHECKED = (
    " Whether the density of a mini-batch is a sum over its rows could not be checked: all this "
    "assumes it."
)
_MIXES_DRAWS = (
    " The model gave many draws at once another density than one at a time: the fit was trained on the "
    "former, and all numbers here are of the latter. Write it without branches on values of its latents "
    "(torch.where), and fit again"
)


class FitStatus(NamedTuple):
    """How a fit ended, and of what kind its guide and model are."""

    skipped_share: float = 0.0  #: of the steps
    is_interrupted: bool = False  #: whether by Ctrl-C, the end of the time or the callback
    #: why steps ended before their end, or before the ELBO settled, if so, and what to do, in words
    cut_short: str = ""
    remedy: str = ""  #: what to use where the guide is not the posterior, if that is known
    is_point: bool = False  #: whether the guide is a single value at some site
    is_random: bool = False  #: whether the model draws mini-batches itself, or is random otherwise
    mixes_draws: bool = False  #: whether the model turned out to mix draws at once, after the fit
    has_chains: bool = False  #: whether draws are those of chains
    #: finds dependencies of the posterior that the guide's graph has not, in words
    missing: Callable[[], Sequence[str]] = tuple
    coarse: Sequence[str] = ()  #: the sites whose draws their dtype hardly tells apart
    point_estimates: Sequence[str] = ()  #: the parameters of the model that were trained
    start_failed: bool = False  #: whether the search for a start left the guide where it was
    #: why the density of mini-batches is no sum over rows, if so; ``None`` where that is not known
    no_sum: str | None = ""
    prior_only: str = ""  #: why the posterior is the prior, in a sentence, if it is


class LostModes(NamedTuple):
    """Modes of a posterior where a guide has next to no draws."""

    lost_mass: float = 0.0  #: their share of the posterior
    num_lost: int = 0  #: how many they are
    was_searched: bool = False  #: whether chains began all over the prior, for others to be seen


NOT_SEARCHED = LostModes()


class Verdict(NamedTuple):
    """Whether a posterior can be trusted, and the sentence that says so."""

    trusted: bool
    words: str


def judge(
    status: FitStatus,
    weights: Importance | None = None,
    lost: LostModes = NOT_SEARCHED,
    *,
    about_others: str = "",
    praise: str = "",
) -> Verdict:
    """The verdict on a fit, which is told that it was cut short before anything else.

    :param weights: those of the guide's own draws, unless mini-batches hide them.
    :param about_others: what mini-batches leave to object to.
    :param praise: the words without an objection, where those about the weights are not the ones.
    """
    objections = []
    if status.skipped_share > _MOST_SKIPPED:
        objections.append(
            f"{100 * status.skipped_share:.0f} % of the steps had to be skipped, since the loss or its "
            "gradient was not finite: result.culprits has the sites. Use tighter priors, or supports "
            "that keep scales away from zero"
        )
    objections += about_draws(status)
    if status.no_sum:
        objections.append(status.no_sum)
    if status.is_point or status.is_random:
        objections.append(_POINT if status.is_point else _SUBSAMPLED)
    elif weights is not None:
        modes = list(about_lost_modes(lost, not status.cut_short))
        # neither another guide nor more draws help against modes
        objections += [*about_weights(weights, "" if modes else status.remedy), *modes]
    if about_others:
        objections.append(about_others)
    # chains are right whatever the graph is: then more than seconds are not spent on it in vain
    if not (status.has_chains and objections) and (missing := status.missing()):
        objections.append(
            "the guide's graph lacks dependencies that the model has where the posterior is: "
            f"{first_of(missing)}. They were switched off where the graph was found: "
            "make it anew with an init_loc_fn of values where they are on, such as "
            "init_to_value(values=guide.median()), or use AutoIAF"
        )
    if status.cut_short and (objections or status.is_interrupted):
        objections.insert(0, status.cut_short)
    note = f"{_MIXES_DRAWS}." if status.mixes_draws else ""
    if status.start_failed:
        note += (
            " The search for a starting point failed, since no Gaussian around one has a finite ELBO: the "
            "guide began where its arguments put it."
        )
    if status.point_estimates:
        names = first_of(status.point_estimates)
        note += (
            f" The model's own parameters are point estimates ({names}): all this is given them."
        )
    if status.no_sum is None and not objections:
        note += _SUM_NOT_CHECKED
    head = f"{status.prior_only} " if status.prior_only else ""
    if objections or (weights is None and not praise):
        return Verdict(False, f"{head}Not trusted: {'; '.join(objections)}.{note}")
    return Verdict(True, (praise or _about_success(cast(Importance, weights), lost)) + note)


def about_draws(status: FitStatus) -> Iterator[str]:
    """Objections to draws of the prior, or rounded to few values."""
    if status.prior_only:
        yield GIVE_DATA
    if status.coarse:
        yield (
            f"the posterior of site {first_of(status.coarse)} is about as narrow as the spacing of "
            "floating-point numbers there: its draws are rounded to a few values. Use float64, or write "
            "the site on the scale of its posterior"
        )


def about_weights(found: Importance, remedy: str) -> Iterator[str]:
    """Objections to weights of a guide's draws."""
    if found.num_nonfinite:
        yield (
            f"the model's density is zero or fails at {found.num_nonfinite} of {found.num_samples} "
            "draws of the guide: check supports and data"
        )
        return
    poor, dtype = list[str](), found.log_weights.dtype
    round_off, of_mean = round_off_of(found.log_weights), torch.finfo(dtype).eps * abs(found.elbo)
    if not of_mean < 1 or (round_off > GOOD_GAP and found.khat == WORST_KHAT):
        remedy = ""
        yield (
            f"the weights are the round-off of {dtype}, which is up to {max(round_off, of_mean):.2g} nats of "
            f"a log-density of {found.elbo:.3g}: nothing is known of their tail. Use "
            + ("tighter priors" if dtype == torch.float64 else "float64")
        )
    elif found.has_heavy_tail:
        poor.append(
            f"k-hat is {found.khat:.2f} ± {found.khat_se:.2f}, above {GOOD_KHAT}: the posterior has "
            "tails or corners that the guide does not reach"
        )
    if found.elbo_se > GOOD_ELBO_SE:
        poor.append(
            f"the ELBO is known to {found.elbo_se:.2g} nats only: the weights of the guide's draws "
            "vary too much"
        )
    if (gap := found.log_evidence - found.elbo) > GOOD_GAP:
        poor.append(
            f"the ELBO is {gap:.2f} nats below the log evidence: the guide is not flexible enough, or "
            "was not trained for long enough"
        )
    if poor:
        yield "; ".join(poor) + (f". Use {remedy}" if remedy else "")


def about_lost_modes(lost: LostModes, is_settled: bool = True) -> Iterator[str]:
    """The objection to a guide that leaves out modes."""
    if lost.lost_mass > GOOD_LOST_MASS:
        yield (
            f"about {100 * lost.lost_mass:.0f} % of the posterior is in {lost.num_lost} other mode(s) that "
            "restarts found, where the guide has next to no draws"
            + (f". {BREAK_SYMMETRY}, or sum out what switches" if is_settled else "")
        )


def about_marginals(found: Marginals | None, ensemble: Ensemble | None) -> str:
    """What the draws of an ensemble say of single latents, or why they say nothing."""
    if found is not None:
        unclear = "Marginals not trusted" if found.is_off else "Marginals not known well enough"
        head = "Marginals trusted" if found.trusted else unclear
        return f" {head}: {found.words}."
    reason = "there are no chains"
    if ensemble is not None:
        has_mixed = ensemble.convergence().has_mixed
        reason = "the guide is a point or not finite" if has_mixed else "chains have not mixed"
    return f" Single latents were not checked, since {reason}."


def about_minibatches(found: PassEstimate, is_of_all: bool, reason: str) -> str:
    """The objection to a fit by mini-batches: what a pass over a loader leaves unknown, and why."""
    of = "of all data" if is_of_all else "of a batch, on the average,"
    return (
        f"it was trained on mini-batches: the ELBO {of} is {found.elbo:.3f} ± {found.elbo_se:.3f} "
        f"({found.num_batches} batches), but k-hat and the evidence are not known, since {reason}. On "
        "data that fit into memory run diagnostics.importance with all of them and a model that does "
        "not sub-sample; on others, diagnostics.sbc with simulated data"
    )


def about_elements(found: ElementWeights, remedy: str) -> str:
    """The objection to a fit by mini-batches with latents of their elements; empty where all is trusted.

    The noise of log weights that is admitted is about the best for pseudo-marginal chains. See Efficient
    Implementation of Markov Chain Monte Carlo When Using an Unbiased Likelihood Estimator (Doucet, Pitt,
    Deligiannidis, Kohn, 2015), https://arxiv.org/abs/1210.1871
    """
    if words := found.elements.objection:
        hint = f". Where these are few, look at their data; where they are many, use {remedy}"
        return words + (hint if remedy else "")
    if found.noise > _MOST_NOISE:
        more = "more draws of each element (MinibatchConfig.min_inner)"
        return (
            f"nothing is known of the latents that all elements share: with {found.num_inner} draws of each "
            f"element their log weights have a variance of {found.noise:.2g} by noise alone, above "
            f"{_MOST_NOISE:.0f}" + (f". Use {more}, or {remedy}" if remedy else "")
        )
    return "" if found.shared is None else "; ".join(about_weights(found.shared, remedy))


def about_good_elements(found: ElementWeights) -> str:
    """The verdict on such a fit where all is trusted."""
    elements, words, why = found.elements, "Trusted: ", ""
    worst = int(elements.khat.argmax())
    if elements.khat[worst] > GOOD_KHAT:
        why = "as the largest of so many good ones is by chance"
        if elements.tail_share[worst] <= GOOD_TAIL:
            why = "of a tail too light to matter"
        why = f" (above {GOOD_KHAT}, {why})"
    if (shared := found.shared) is not None:
        gap = max(shared.log_evidence - shared.elbo, 0.0)
        words += (
            f"of the latents that all elements share the ELBO is {gap:.3f} nats below the log evidence "
            f"{shared.log_evidence:.3f}, k-hat is {shared.khat:.2f} ± {shared.khat_se:.2f}; "
        )
    return (
        f"{words}of {len(elements.khat):,} elements of plate '{elements.plate}' the largest such distance is "
        f"{elements.gap.max():.3f} nats, and the largest k-hat {elements.khat[worst]:.2f}{why}"
        f"{_ELSEWHERE[False]}"
    )


def _about_success(found: Importance, lost: LostModes) -> str:
    gap = max(found.log_evidence - found.elbo, 0.0)
    words = (
        f"Trusted: the ELBO is {gap:.3f} nats below the log evidence {found.log_evidence:.3f}, k-hat "
        f"is {found.khat:.2f} ± {found.khat_se:.2f}"
    )
    if not found.trusted:
        share = f"{100 * found.tail_share:.1g} % of the weight"
        words += f" (of a tail of {share}, too little to matter)"
    if lost.num_lost:
        return (
            f"{words}, but about {100 * lost.lost_mass:.0f} % of the posterior is in {lost.num_lost} "
            "other mode(s) that the guide leaves out."
        )
    return words + _ELSEWHERE[lost.was_searched]
