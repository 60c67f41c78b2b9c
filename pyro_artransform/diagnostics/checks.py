# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The list of checks of draws and guides, what a failed one says, and the layout of verdicts.

To add a check, add an entry to :class:`Check`, and hand it numbers where they are measured, by
``Check.NAME.apply(...)`` in ``sampling/chains.py`` for draws, in ``inference/evaluation/verdict.py`` for
guides. ``python docs/check_table.py`` makes its row in ``docs/verdict.md``.
"""

import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import Enum
from itertools import groupby
from operator import attrgetter
from typing import Any, NamedTuple

from .._base.arguments import first_of, warn_user
from .convergence import GOOD_RHAT, MANY_DIVERGENT, MODES_RHAT
from .importance_sampling import GOOD_ELBO_SE, GOOD_GAP, GOOD_KHAT, GOOD_LOST_MASS
from .psis import WORST_KHAT

_WIDTH, _LABEL = 100, 13  # the width of lines, and of row names
_BREAK_SYMMETRY = (
    "If modes differ by labels or signs alone, break the symmetry in the model (ordered supports, tighter "
    "priors)"
)
CORNER = "Use a prior that keeps scales away from zero, or another parametrization"
# the largest percentage of the posterior beyond the outer 1 % quantile of draws; correct draws of the
# volatility model in benchmarks/chains.md have 3.7
_MOST_BEYOND = 4.0
_MOST_NOISE = 1.0  # the largest variance of log weights due to noise


class CheckEntry(NamedTuple):
    """An entry of the list of checks.

    A remedy that begins with a lower-case letter follows the sentence after a colon.
    """

    sentence: str  #: what a verdict says of a failure, with fields for numbers and names
    remedy: str  #: what to do, with fields
    #: what it means, for ``docs/verdict.md``; empty if the sentence is made elsewhere, and its row by hand
    meaning: str = ""
    #: whether the check fails, given fields and other numbers; by default, if any of these is not empty
    fails: Callable[..., object] = lambda **measured: any(measured.values())


class Check(Enum):
    """The checks of draws and guides, each with what a verdict says of a failure, and a remedy."""

    # of draws and guides
    PRIOR = CheckEntry(
        "{prior_only}",
        "pass the data to the model, as in fit(model, x, y), and to a site that depends on the latents, by "
        "obs= or pyro.factor",
    )
    ROUNDED = CheckEntry(
        "the posterior of site {sites} is hardly wider than the spacing of floating-point numbers: its draws "
        "are rounded to a few values",
        "Use float64, or rescale the site to the scale of its posterior",
        "draws are rounded, as for a `Uniform(0, 1)` near 1 in float32, and so are their moments",
    )
    EDGE = CheckEntry(
        "draws of site {sites} reach the smallest numbers of their dtype, or the largest below one, where "
        "the rest of the posterior is cut off",
        "Use float64, or a prior that keeps the site away from the edge of its support",
        "the draws are of what the dtype can hold, as with a `Gamma(0.01, 0.01)` in float32",
    )
    # of draws
    MODES = CheckEntry(
        "chains found {modes}: {between}",
        "Tighter priors may leave fewer modes. With up to 50 latents, chains of fit(model, *args) jump by a "
        "flow for each mode",
        "if chains do not move between them, the draws have wrong shares, and these are of a Gaussian "
        "approximation. If more than one was reached from one start only, there may be others (Good, 1953, "
        "https://doi.org/10.1093/biomet/40.3-4.237). More draws or a better guide will not help",
        fails=lambda is_apart, num_single, **_: is_apart or num_single > 1,
    )
    WARM_UP = CheckEntry(
        "time was over before chains had adapted (draws of each chain: {count})",
        "Allow more time",
        "time ran out in the warm-up, or soon after: the draws are not worth looking at",
        fails=lambda num_trajectories, **_: num_trajectories < 8,
    )
    JUMPS = CheckEntry(
        "the log density jumps, since the error of the energy does not shrink with the step size: the model "
        "compares a latent, as in torch.where(t < tau, a, b), or rounds one",
        "Write a smooth change, such as torch.sigmoid((t - tau) / width), or enumerate a discrete latent",
        "gradients do not show a jump, such as a change point, so most trajectories across it are rejected",
        # the step size is adapted to an acceptance of 0.8 where the log density is smooth
        fails=lambda acceptance, has_jumps: acceptance < 0.5 and has_jumps(),
    )
    UNDETERMINED = CheckEntry(
        "neither prior nor data determine {names}: the draws drift without end",
        "Use proper priors, or fix one of several latents of which only a sum or a product matters",
        "as with an improper prior of latents of which only the sum has data",
    )
    MIXING = CheckEntry(
        f"chains have not mixed: R-hat is {{rhat:.3f}} for {{name}}, above {GOOD_RHAT}",
        "{remedy}",
        "superchains differ in that latent. A guide is not trusted either if R-hat is above "
        f"{MODES_RHAT} without a known mode: some chains may be where it has no draws",
        fails=lambda rhat, **_: not rhat <= GOOD_RHAT,
    )
    ESS = CheckEntry(
        "{name} has {ess:.0f} effective draws{where}, not {wanted}",
        "{remedy}",
        "time ran out (`max_seconds`, Ctrl-C), or more trajectories would hardly help. If R-hat is good, "
        "estimates are noisier but not wrong. “ in the tails” is about 5 and 95 % quantiles",
        fails=lambda ess, wanted, **_: not ess >= wanted,
    )
    DIVERGENCES = CheckEntry(
        "{percent:.3g} % of the trajectories diverged: the step size is too large for a region of high "
        "curvature, such as a scale near zero, and the draws underrepresent it",
        CORNER,
        f"more than {100 * MANY_DIVERGENT:g} % had an energy error of more than 1,000 nats, although step "
        "sizes were halved three times. At a steep edge of a density the draws may be right",
        # independent proposals reach corners that trajectories miss, so that divergences do not matter then
        fails=lambda percent, has_proposals: percent > 100 * MANY_DIVERGENT and not has_proposals,
    )
    TAIL = CheckEntry(
        "the draws of {name} miss a tail: by a Laplace approximation, {percent:.3g} % of the posterior is "
        "beyond their outer 1 % quantile",
        CORNER,
        f"more than {_MOST_BEYOND:g} % is, for globals of a path without location and scale in its prior",
        fails=lambda percent, **_: percent > _MOST_BEYOND,
    )
    # of guides
    NO_CHAINS = CheckEntry(
        "the guide was not checked by chains, since none could start: {reason}",
        "",
        "the reason names the site and what was tried. The guide may lack modes or tails",
    )
    FAILED = CheckEntry(
        "an error ended the start, the training or the evaluation of the guide: {error}",
        "Mend what the error names. Draws that are trusted need no guide",
        "draws of chains do not depend on it; the guide keeps its last parameters, its numbers are `nan`",
    )
    CUT_SHORT = CheckEntry("{reason}", "{remedy}")
    SKIPPED = CheckEntry(
        "{percent:.0f} % of the steps were skipped, since the loss or its gradient was not finite: "
        "result.culprits names the sites",
        "Use tighter priors, or supports that keep scales away from zero",
        "the model overflows at draws from the guide",
        fails=lambda percent: percent > 10,
    )
    POINT = CheckEntry(
        "the guide has a point mass at some site, like AutoDelta (or AutoLaplaceApproximation before "
        "laplace_approximation): a point estimate, not a posterior",
        "Use AutoIAF",
        "such guides give an estimate of the mode",
    )
    SUBSAMPLED = CheckEntry(
        "not judged, since the model subsamples its data or is random in another way, so that only a noisy "
        "ELBO is known",
        "pass loader=, with the rows of a batch as the arguments of the model",
        "the numbers `khat`, `ess` and `log_evidence` are `nan`",
    )
    DENSITY = CheckEntry(
        "the log density of the model is not finite at {count} of {num_samples} draws of the guide",
        "check supports and data",
        "the guide draws values that the model does not allow, or data are impossible at any latents",
        fails=lambda count, **_: count,
    )
    ROUND_OFF = CheckEntry(
        "the importance weights are dominated by the round-off of {dtype}, up to {nats:.2g} nats in a log "
        "density of {elbo:.3g}: their tail is unknown",
        "Use {remedy}",
        "log densities are too large for float32; in float64, the model almost excludes some draws",
        fails=lambda of_mean, round_off, khat, **_: (
            not of_mean < 1 or (round_off > GOOD_GAP and khat == WORST_KHAT)
        ),
    )
    KHAT = CheckEntry(
        f"k-hat is {{khat:.2f}} ± {{khat_se:.2f}}, above {GOOD_KHAT}{{borderline}}: the guide does not cover "
        "some part of the posterior, such as a tail",
        "{remedy}",
        "means may be right and tails wrong; do not use the evidence",
        fails=lambda has_heavy_tail, **_: has_heavy_tail,
    )
    ELBO_NOISE = CheckEntry(
        "the standard error of the ELBO is {elbo_se:.2g} nats: the log weights of the guide's draws vary too "
        "much",
        "{remedy}",
        "estimates from importance weights are too noisy",
        fails=lambda elbo_se, **_: elbo_se > GOOD_ELBO_SE,
    )
    GAP = CheckEntry(
        "the ELBO is {gap:.2f} nats below the log evidence: the guide is not flexible enough, or was not "
        "trained for long enough",
        "{remedy}",
        "the guide's own draws show that it differs from the posterior",
        fails=lambda gap, **_: gap > GOOD_GAP,
    )
    LOST_MODES = CheckEntry(
        "about {percent:.0f} % of the posterior is in {count} other mode(s), found by chains, where the "
        "guide has almost no draws",
        _BREAK_SYMMETRY,
        "the guide gives them less than a tenth of their probability. More draws will not help",
        fails=lambda percent, **_: percent > 100 * GOOD_LOST_MASS,
    )
    MARGINALS = CheckEntry(
        "means or standard deviations of the guide clearly differ from those of the chains' draws",
        "{remedy}",
        "its own draws may not show it. The row *marginals* has the largest [errors](#marginals)",
        fails=lambda found, **_: found is not None and found.is_off,
    )
    GRAPH = CheckEntry(
        "the guide's graph lacks dependencies that the posterior has: {names}",
        "They were inactive at the initial values: make a new guide with an init_loc_fn where they are "
        "active, such as init_to_value(values=guide.median()), or use AutoIAF. In float32, round-off can "
        "look like a dependency: use float64",
        "a branch of the model was not taken where `AutoStructuredFlow` looked for dependencies",
    )
    MINIBATCHES = CheckEntry(
        "the guide was trained on mini-batches: the ELBO {of} is {elbo:.3f} ± {elbo_se:.3f} ({num_batches} "
        "batches), but k-hat and the evidence are unknown, since {reason}",
        "If all data fit into memory, run diagnostics.importance on them with a model that does not "
        "subsample; otherwise check the method on simulated data (docs/verdict.md, calibration)",
        "weights are too noisy, or a pass over the loader does not cover all data",
    )
    ELEMENTS = CheckEntry(
        "{found}",
        "If they are few, check their data; if they are many, use {remedy}",
        fails=lambda found, **_: found,
    )
    ELEMENT_NOISE = CheckEntry(
        "the shared latents could not be checked: with {count} draws per element, noise alone gives their "
        f"log weights a variance of {{noise:.2g}}, above {_MOST_NOISE:.0f}",
        "Use {remedy}",
        "each element is good, but the sum of their log weights is too noisy; more steps use more draws",
        fails=lambda noise, **_: noise > _MOST_NOISE,
    )

    def __repr__(self) -> str:
        return f"Check.{self.name}"

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        return getattr, (Check, self.name)  # conditions cannot be pickled

    def apply(self, **measured: Any) -> tuple["FailedCheck", ...]:
        """The failed check, if its condition holds for these numbers; else nothing."""
        return (self.failed(**measured),) if self.value.fails(**measured) else ()

    def failed(self, **fields: Any) -> "FailedCheck":
        """The failed check with numbers and names filled in; no remedy if ``remedy=None``.

        :param fields: of lists of names, the first five are shown.
        """
        entry: CheckEntry = self.value
        words = {k: first_of(v) if isinstance(v, list | tuple) else v for k, v in fields.items()}
        has_remedy = fields.get("remedy", "") is not None
        remedy = entry.remedy.format(**words) if has_remedy else ""
        return FailedCheck(self, entry.sentence.format(**words), remedy)


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

    def rows(self, after: Iterable[FailedCheck] = ()) -> Iterator[tuple[str, str]]:
        """The failed checks with their remedies, and the notes, as rows of a table.

        :param after: failed checks that the table has already, to which rows refer.
        """
        known = {*after}
        same = "the same as of the draws, above"
        shown = (FailedCheck(f.check, same) if f in known else f for f in self.failed)
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


def warn_of_prior(has_data: bool) -> str:
    """Warns of a model without data; returns a sentence that says so, and an empty one with data."""
    if has_data:
        return ""
    words = "The model has no observed site (no obs= and no pyro.factor), so the posterior is the prior."
    warn_user(f"{words} Please {Check.PRIOR.value.remedy}", UserWarning)
    return words


def about_draws(
    prior_only: str, coarse: Sequence[str], at_edge: Sequence[str]
) -> Iterator[FailedCheck]:
    """The failed checks for draws from the prior, rounded to few values, or cut off by their dtype."""
    yield from Check.PRIOR.apply(prior_only=prior_only)
    yield from Check.ROUNDED.apply(sites=coarse)
    yield from Check.EDGE.apply(sites=at_edge)
