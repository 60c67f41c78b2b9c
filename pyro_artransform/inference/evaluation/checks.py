# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The checks of draws and guides, the sentences for failed checks, and their layout."""

import textwrap
from collections.abc import Iterable, Iterator
from enum import Enum
from itertools import groupby
from operator import attrgetter
from typing import Any, NamedTuple

from ..prior_only import GIVE_DATA

_WIDTH, _LABEL = 100, 13  # the width of lines, and of row names
_BREAK_SYMMETRY = "Break the symmetry in the model (ordered supports, tighter priors)"
CORNER = "Use a prior that keeps scales away from zero, or another parametrization"


class Check(Enum):
    """The checks of draws and guides, each with the sentence for a failure and a remedy.

    A remedy that begins with a lower-case letter follows the sentence after a colon.
    """

    # of draws and guides
    PRIOR = ("{prior_only}", GIVE_DATA)
    ROUNDED = (
        "the posterior of site {sites} is about as narrow as the spacing of floating-point numbers there: "
        "its draws are rounded to a few values",
        "Use float64, or write the site on the scale of its posterior",
    )
    # of draws
    MODES = (
        "starts led to {count} modes, with about {shares} of the posterior as far as Gaussians tell, which "
        "differ in {names}, {between}",
        _BREAK_SYMMETRY,
    )
    MIXING = ("chains have not mixed: R-hat is {rhat:.3f} for {name}, above {bound}", "{remedy}")
    ESS = (
        "{name} has {ess:.0f} effective draws{where}, not {wanted}",
        "{remedy}",
    )
    DIVERGENCES = (
        "{percent:.2g} % of the trajectories diverged: there is a corner that steps of this size do not "
        "enter, such as a scale near zero, and draws have too little of it",
        CORNER,
    )
    TAIL = (
        "the draws of {name} lack a tail: by Laplace's approximation {percent:.2g} % of the posterior is "
        "beyond their outer 1 % quantile",
        CORNER,
    )
    # of guides
    CUT_SHORT = ("{reason}", "{remedy}")
    SKIPPED = (
        "{percent:.0f} % of the steps had to be skipped, since the loss or its gradient was not finite: "
        "result.culprits has the sites",
        "Use tighter priors, or supports that keep scales away from zero",
    )
    NO_SUM = (
        "the log density of a mini-batch is no sum over its rows: that of two batches is {before:.6g}, and "
        "{after:.6g} once they have exchanged every other row, as of a model that centers (y - y.mean()), "
        "standardizes or normalizes by the batch",
        "Compute such numbers from all data before the fit, as arguments of it",
    )
    POINT = (
        "the guide is a point at some site, as AutoDelta is (and AutoLaplaceApproximation before its "
        "laplace_approximation): an estimate of the mode, and no posterior",
        "Use AutoIAF",
    )
    SUBSAMPLED = (
        "the model sub-samples its data, or is random otherwise, so that the numbers below rest on the noisy "
        "density of mini-batches: the ELBO is right but for noise, k-hat and the evidence mean nothing",
        "Run diagnostics.importance with a model that sees all data",
    )
    DENSITY = (
        "the model's density is zero or fails at {count} of {num_samples} draws of the guide",
        "check supports and data",
    )
    ROUND_OFF = (
        "the weights are the round-off of {dtype}, which is up to {nats:.2g} nats of a log-density of "
        "{elbo:.3g}: nothing is known of their tail",
        "Use {remedy}",
    )
    KHAT = (
        "k-hat is {khat:.2f} ± {khat_se:.2f}, above {bound}: the posterior has tails or corners that the "
        "guide does not reach",
        "{remedy}",
    )
    ELBO_NOISE = (
        "the ELBO is known to {elbo_se:.2g} nats only: the weights of the guide's draws vary too much",
        "{remedy}",
    )
    GAP = (
        "the ELBO is {gap:.2f} nats below the log evidence: the guide is not flexible enough, or was not "
        "trained for long enough",
        "{remedy}",
    )
    LOST_MODES = (
        "about {percent:.0f} % of the posterior is in {count} other mode(s) that restarts found, where the "
        "guide has next to no draws",
        f"{_BREAK_SYMMETRY}, or sum out what switches",
    )
    RESTARTS = (
        "chains from all over the prior have not mixed, with an R-hat of {rhat:.3f}, so that the guide may "
        "lack modes or tails",
        "Ask for draws, draws=400, or use tighter priors",
    )
    GRAPH = (
        "the guide's graph lacks dependencies that the model has where the posterior is: {names}",
        "They were switched off where the graph was found: make it anew with an init_loc_fn of values where "
        "they are on, such as init_to_value(values=guide.median()), or use AutoIAF. In float32 round-off may "
        "look like them: use float64",
    )
    MINIBATCHES = (
        "it was trained on mini-batches: the ELBO {of} is {elbo:.3f} ± {elbo_se:.3f} ({num_batches} "
        "batches), but k-hat and the evidence are not known, since {reason}",
        "On data that fit into memory run diagnostics.importance with all of them and a model that does not "
        "sub-sample; on others, diagnostics.sbc with simulated data",
    )
    ELEMENTS = (
        "{found}",
        "Where these are few, look at their data; where they are many, use {remedy}",
    )
    ELEMENT_NOISE = (
        "nothing is known of the latents that all elements share: with {count} draws of each element their "
        "log weights have a variance of {noise:.2g} by noise alone, above {bound:.0f}",
        "Use more draws of each element (MinibatchConfig.min_inner), or {remedy}",
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
