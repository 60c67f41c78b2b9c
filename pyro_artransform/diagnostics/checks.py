# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The checks of draws and guides, the sentences for failed checks, and their layout."""

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from enum import Enum
from itertools import groupby
from operator import attrgetter
from typing import Any, NamedTuple

from .._base.arguments import first_of
from ..model.prior_only import GIVE_DATA

_WIDTH, _LABEL = 100, 13  # the width of lines, and of row names
_BREAK_SYMMETRY = (
    "If modes differ by labels or signs alone, break the symmetry in the model (ordered supports, tighter "
    "priors)"
)
CORNER = "Use a prior that keeps scales away from zero, or another parametrization"


class Check(Enum):
    """The checks of draws and guides, each with the sentence for a failure and a remedy.

    A remedy that begins with a lower-case letter follows the sentence after a colon.
    """

    # of draws and guides
    PRIOR = ("{prior_only}", GIVE_DATA)
    ROUNDED = (
        "the posterior of site {sites} is hardly wider than the spacing of floating-point numbers: its draws "
        "are rounded to a few values",
        "Use float64, or rescale the site to the scale of its posterior",
    )
    EDGE = (
        "draws of site {sites} reach the smallest numbers of their dtype, or the largest below one, where "
        "the rest of the posterior is cut off",
        "Use float64, or a prior that keeps the site away from the edge of its support",
    )
    # of draws
    MODES = (
        "chains found {count} modes, which differ in {names} and have about {shares} of the posterior by a "
        "Gaussian approximation: {between}",
        _BREAK_SYMMETRY,
    )
    WARM_UP = (
        "time was over before chains had adapted (draws of each chain: {count})",
        "Allow more time",
    )
    JUMPS = (
        "the log density jumps, since the error of the energy does not shrink with the step size: the model "
        "compares a latent, as in torch.where(t < tau, a, b), or rounds one",
        "Write a smooth change, such as torch.sigmoid((t - tau) / width), or enumerate a discrete latent",
    )
    UNDETERMINED = (
        "neither prior nor data determine {names}: the draws drift without end",
        "Use proper priors, or fix one of several latents of which only a sum or a product matters",
    )
    MIXING = ("chains have not mixed: R-hat is {rhat:.3f} for {name}, above {bound}", "{remedy}")
    ESS = (
        "{name} has {ess:.0f} effective draws{where}, not {wanted}",
        "{remedy}",
    )
    DIVERGENCES = (
        "{percent:.2g} % of the trajectories diverged: the step size is too large for a region of high "
        "curvature, such as a scale near zero, and the draws underrepresent it",
        CORNER,
    )
    TAIL = (
        "the draws of {name} miss a tail: by a Laplace approximation, {percent:.2g} % of the posterior is "
        "beyond their outer 1 % quantile",
        CORNER,
    )
    # of guides
    NO_CHAINS = ("the guide was not checked by chains, since none could start: {reason}", "")
    CUT_SHORT = ("{reason}", "{remedy}")
    SKIPPED = (
        "{percent:.0f} % of the steps were skipped, since the loss or its gradient was not finite: "
        "result.culprits names the sites",
        "Use tighter priors, or supports that keep scales away from zero",
    )
    NO_SUM = (
        "the log density of a mini-batch is not a sum over its rows: the total of two batches changes from "
        "{before:.6g} to {after:.6g} when they exchange every other row, as if the model centred (y - "
        "y.mean()), standardized or normalized within the batch",
        "Compute such statistics from all data, and pass them to the model",
    )
    POINT = (
        "the guide has a point mass at some site, like AutoDelta (or AutoLaplaceApproximation before "
        "laplace_approximation): a point estimate, not a posterior",
        "Use AutoIAF",
    )
    SUBSAMPLED = (
        "the model subsamples its data or is random in another way, so the numbers below come from a noisy "
        "density: the ELBO is correct up to noise, but k-hat and the evidence are meaningless",
        "Run diagnostics.importance with a model that sees all data",
    )
    DENSITY = (
        "the log density of the model is not finite at {count} of {num_samples} draws of the guide",
        "check supports and data",
    )
    ROUND_OFF = (
        "the importance weights are dominated by the round-off of {dtype}, up to {nats:.2g} nats in a log "
        "density of {elbo:.3g}: their tail is unknown",
        "Use {remedy}",
    )
    KHAT = (
        "k-hat is {khat:.2f} ± {khat_se:.2f}, above {bound}: the guide does not cover some part of the "
        "posterior, such as a tail",
        "{remedy}",
    )
    ELBO_NOISE = (
        "the standard error of the ELBO is {elbo_se:.2g} nats: the log weights of the guide's draws vary too "
        "much",
        "{remedy}",
    )
    GAP = (
        "the ELBO is {gap:.2f} nats below the log evidence: the guide is not flexible enough, or was not "
        "trained for long enough",
        "{remedy}",
    )
    LOST_MODES = (
        "about {percent:.0f} % of the posterior is in {count} other mode(s), found by restarts, where the "
        "guide has almost no draws",
        _BREAK_SYMMETRY,
    )
    RESTARTS = (
        "chains from starting points spread over the prior have not mixed (R-hat is {rhat:.3f}), so the "
        "guide may miss modes or tails",
        "Request draws (draws=400), or use tighter priors",
    )
    GRAPH = (
        "the guide's graph lacks dependencies that the posterior has: {names}",
        "They were inactive at the initial values: make a new guide with an init_loc_fn where they are "
        "active, such as init_to_value(values=guide.median()), or use AutoIAF. In float32, round-off can "
        "look like a dependency: use float64",
    )
    MINIBATCHES = (
        "the guide was trained on mini-batches: the ELBO {of} is {elbo:.3f} ± {elbo_se:.3f} ({num_batches} "
        "batches), but k-hat and the evidence are unknown, since {reason}",
        "If all data fit into memory, run diagnostics.importance on them with a model that does not "
        "subsample; otherwise run diagnostics.sbc on simulated data",
    )
    ELEMENTS = (
        "{found}",
        "If they are few, check their data; if they are many, use {remedy}",
    )
    ELEMENT_NOISE = (
        "the shared latents could not be checked: with {count} draws per element, noise alone gives their "
        "log weights a variance of {noise:.2g}, above {bound:.0f}",
        "Use {remedy}",
    )

    def __repr__(self) -> str:
        return f"Check.{self.name}"

    def failed(self, **fields: Any) -> "FailedCheck":
        """The failed check with numbers and names filled in; no remedy if ``remedy=None``."""
        sentence, remedy = self.value
        has_remedy = fields.get("remedy", "") is not None
        return FailedCheck(
            self, sentence.format(**fields), remedy.format(**fields) if has_remedy else ""
        )


class FailedCheck(NamedTuple):
    """A failed check: a sentence without its full stop, and a remedy, if one is known."""

    check: Check
    sentence: str
    remedy: str = ""


class Verdict(NamedTuple):
    """Whether draws or a guide can be trusted, with the reasons."""

    failed: tuple[FailedCheck, ...] = ()  #: the failed checks
    praise: str = ""  #: a sentence for the case that none failed
    notes: tuple[str, ...] = ()  #: remarks, in sentences
    marginals: str = ""  #: a sentence on the marginals
    of: str = ""  #: the subject of the verdict; empty for a guide

    @property
    def trusted(self) -> bool:
        """Whether all checks passed."""
        return not self.failed

    @property
    def words(self) -> str:
        """The whole verdict as one text."""
        trusted = "trusted" if self.trusted else "not trusted"
        words = f"{self.of} {trusted}".strip().capitalize()
        text = f"{_joined(self.failed)}." if self.failed else self.praise
        heads = [each.sentence for each in self.failed if each.check is Check.PRIOR]
        parts = (*heads, f"{words}: {text}", *self.notes, self.marginals)
        return " ".join(filter(None, parts))

    def rows(self, without: Iterable[FailedCheck] = ()) -> Iterator[tuple[str, str]]:
        """The failed checks with their remedies, and the notes, as rows of a table.

        :param without: failed checks to leave out.
        """
        omitted = {*without}
        shown = (failed for failed in self.failed if failed not in omitted)
        for remedy, failed in groupby(shown, attrgetter("remedy")):
            yield from (("failed", each.sentence.removesuffix(".")) for each in failed)
            if remedy:
                yield "remedy", remedy[0].upper() + remedy[1:]
        yield from (("note", note) for note in self.notes)

    @property
    def num_failed(self) -> str:
        """The number of failed checks, in words."""
        return f"{len(self.failed)} check{'s' * (len(self.failed) > 1)} failed"


def _joined(failed: Iterable[FailedCheck]) -> str:
    """The sentences as one text; consecutive ones with the same remedy share it."""
    parts = []
    for remedy, same in groupby(failed, attrgetter("remedy")):
        sentences = "; ".join(each.sentence for each in same if each.check is not Check.PRIOR)
        colon = ": " if remedy[:1].islower() else ". "
        parts.append(colon.join(filter(None, (sentences, remedy))))
    return "; ".join(parts)


def as_lines(rows: Iterable[tuple[str, str]]) -> list[str]:
    """The rows of a table as wrapped lines that begin with their names."""
    return [
        textwrap.fill(
            text,
            _WIDTH,
            initial_indent=f"  {name:{_LABEL}} ",
            subsequent_indent=" " * (_LABEL + 3),
            break_long_words=False,
            break_on_hyphens=False,
        )
        for name, text in rows
    ]


def about_draws(
    prior_only: str, coarse: Sequence[str], at_edge: Sequence[str]
) -> Iterator[FailedCheck]:
    """The failed checks for draws from the prior, rounded to few values, or cut off by their dtype."""
    if prior_only:
        yield Check.PRIOR.failed(prior_only=prior_only)
    if coarse:
        yield Check.ROUNDED.failed(sites=first_of(coarse))
    if at_edge:
        yield Check.EDGE.failed(sites=first_of(at_edge))
