# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Simulation-based calibration: whether posteriors of simulated data are calibrated on average."""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import torch
from pyro.infer import Predictive
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.util import site_is_factor, site_is_subsample
from torch import Tensor
from torch.distributions import Binomial

from .._base.arguments import check_integer
from ..model.density import Args, Kwargs
from ..model.protocols import PosteriorGuide
from ..model.run_once import run_once
from ..model.traces import in_shape_of_site, is_deterministic
from .importance_weights import Values

_MAX_POINTS = 100  # points at which distribution functions of ranks are compared
_ABOVE_TIES = 1 + 1e-9  # makes ties with the worst point count despite round-off


@dataclass(frozen=True, eq=False)
class SBC:
    """The ranks of true values among draws from the posteriors of simulated data.

    :param ranks: for each site integers from 0 to ``num_draws``, of shape ``(num_simulations,) +
        site shape``; uniform for correct posteriors.
    :param num_draws: the number of draws per posterior.
    """

    ranks: Values
    num_draws: int

    @property
    def num_simulations(self) -> int:
        """The number of simulated data sets."""
        return len(next(iter(self.ranks.values())))

    def pvalues(self) -> Values:
        """The p-value of :func:`~pyro_artransform.diagnostics.uniformity_pvalue` for each coordinate."""
        flat = [ranks.reshape(self.num_simulations, -1) for ranks in self.ranks.values()]
        pvalues = uniformity_pvalue(torch.cat(flat, 1), self.num_draws)
        parts = pvalues.split([ranks.shape[1] for ranks in flat])
        return {k: part.reshape(self.ranks[k].shape[1:]) for k, part in zip(self.ranks, parts)}

    def passed(self, alpha: float = 0.01) -> bool:
        """Whether the ranks of all coordinates are consistent with uniformity.

        :param alpha: the largest probability that correct posteriors fail (Bonferroni's bound).
        """
        pvalues = torch.cat([value.flatten() for value in self.pvalues().values()])
        return bool((pvalues * len(pvalues)).min() >= alpha)

    def coverage(self, levels: Sequence[float] | Tensor = (0.5, 0.9)) -> Values:
        """The coverage of central intervals; for correct posteriors it equals the level.

        :param levels: q probabilities.
        :return: for each site a tensor of shape ``(q,) + site shape``.
        """
        covered = {}
        for name, ranks in self.ranks.items():
            distance = ((ranks + 0.5) / (self.num_draws + 1) - 0.5).abs()
            halves = torch.as_tensor(levels, dtype=distance.dtype, device=distance.device) / 2
            halves = halves.reshape((-1,) + (1,) * distance.dim())
            covered[name] = (distance <= halves).to(distance.dtype).mean(1)
        return covered

    def __repr__(self) -> str:
        coverage, width = self.coverage((0.5, 0.9)), max(map(len, ["site", *self.ranks]))
        result = "passed" if self.passed() else "failed"
        lines = [
            f"SBC with {self.num_simulations} simulations, {self.num_draws} draws each: {result}",
            f"{'site':{width}}  smallest p-value  coverage of 50 %, 90 % intervals",
        ]
        for name, pvalue in self.pvalues().items():
            half, most = (100 * coverage[name].reshape(2, -1).mean(1)).tolist()
            lines.append(f"{name:{width}}  {pvalue.min():16.4f}  {half:14.1f} %, {most:.1f} %")
        return "\n".join(lines)


def sbc(
    model: Callable[..., object],
    fit_one: Callable[[Values], Any],
    *args: object,
    num_simulations: int = 100,
    num_draws: int = 99,
    observed: Iterable[str] | None = None,
    seed: int | None = None,
    progress: bool = True,
    **kwargs: object,
) -> SBC:
    """Simulation-based calibration of an inference method for a model.

    Draws latents and data from the model, computes a posterior from the data alone, and ranks the
    latents among its draws. Over many simulations the ranks are uniform for correct posteriors. This
    detects posteriors that are too narrow, too wide or biased on average over the prior. A posterior
    that ignores its data and equals the prior passes too.

    :param model: a Pyro model without factors, since these cannot be simulated.
    :param fit_one: maps a dict of simulated data by site to a posterior: a guide; a dict of
        independent draws by site, each of shape ``(num_draws,) + site shape``; or a function of the
        number of draws that returns such a dict. Deterministic sites with draws are ranked, too. It
        runs with its own param store, initially empty.
    :param args: the model's arguments. Sites that have data with these are the data sites; the data
        are not used otherwise.
    :param num_simulations: the number of simulated data sets.
    :param num_draws: the number of draws per posterior, the largest possible rank.
    :param observed: further data sites, for a model that samples its data if they are not passed.
    :param seed: sets the seed of Pyro's generators.
    :param progress: whether to show a progress bar.
    :param kwargs: the model's keyword arguments.
    :raises ValueError: if a number is not positive, the model has no data sites or has factors,
        or draws have wrong shapes or no latent's name.
    :raises TypeError: if ``fit_one`` returns something else.

    Example::

        >>> import pyro.distributions as dist
        >>> from pyro_artransform.diagnostics import sbc
        >>> def model(y=None):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     return pyro.sample("y", dist.Normal(z, 1.0), obs=y)
        >>> def fit_one(data):
        ...     return {"z": data["y"] / 2 + 0.5**0.5 * torch.randn(99)}
        >>> result = sbc(model, fit_one, observed=["y"], progress=False)
        >>> result.ranks["z"].shape, result.passed()
        (torch.Size([100]), True)

    **References**

    1. Validating Bayesian Inference Algorithms with Simulation-Based Calibration (Talts, Betancourt,
       Simpson, Vehtari, Gelman, 2018), https://arxiv.org/abs/1804.06788
    """
    from tqdm.auto import trange

    check_integer("num_simulations", num_simulations)
    check_integer("num_draws", num_draws)
    if seed is not None:
        pyro.set_rng_seed(seed)
    run = partial(model, *args, **kwargs)
    names = _data_sites(run, observed)

    all_ranks = []
    for _ in trange(num_simulations, disable=not progress):
        truth = {k: site["value"] for k, site in _sites(run, observed=False).items()}
        data = {name: truth.pop(name) for name in [*truth] if name in names}
        with pyro.get_param_store().scope():
            draws = _draws_of(fit_one(data), num_draws, truth, args, kwargs)
        all_ranks.append(_ranks(truth, draws, num_draws))
    return SBC({k: torch.stack([ranks[k] for ranks in all_ranks]) for k in all_ranks[0]}, num_draws)


def _sites(run: Callable[[], object], observed: bool = True) -> dict[str, Any]:
    """The sample sites of a run, without the subsample indices of plates."""
    nodes = run_once(run, observed=observed, validated=True).nodes
    sampled = {name: node for name, node in nodes.items() if node["type"] == "sample"}
    return {name: node for name, node in sampled.items() if not site_is_subsample(node)}


def _data_sites(run: Callable[[], object], observed: Iterable[str] | None) -> set[str]:
    """The names of the sites with data, and of those in ``observed``."""
    sites = {name: site for name, site in _sites(run).items() if not is_deterministic(site)}
    factors = [name for name, site in sites.items() if site_is_factor(site)]
    if factors:
        raise ValueError(
            f"model: expected one to simulate from, got one with pyro.factor sites {factors}"
        )
    names = {name for name, site in sites.items() if site["is_observed"]} | set(observed or ())
    if unknown := sorted(names - sites.keys()):
        raise ValueError(f"observed: expected sites of {sorted(sites)}, got {unknown}")
    if not names:
        raise ValueError(
            "observed: expected the names of the observed sites, or a model with data, got neither"
        )
    return names


@torch.no_grad()
def _draws_of(
    posterior: object, num_draws: int, truth: Values, args: Args, kwargs: Kwargs
) -> Mapping[str, Tensor]:
    if isinstance(posterior, PosteriorGuide):
        posterior = posterior.sample_posterior(num_draws)
    elif isinstance(posterior, AutoGuide):
        posterior = Predictive(posterior, num_samples=num_draws)(*args, **kwargs)
    elif callable(posterior):
        posterior = posterior(num_draws)
    if isinstance(posterior, Mapping):
        known = posterior.keys() & truth.keys()
        return {**posterior, **{k: in_shape_of_site(posterior[k], truth[k].shape) for k in known}}
    kind = type(posterior).__name__
    raise TypeError(f"fit_one: expected a guide, a dict of draws, or a function, got {kind}")


def _ranks(truth: Values, draws: Mapping[str, Tensor], num_draws: int) -> Values:
    """The number of draws below the true value, for each coordinate."""
    ranks = {}
    for name in [name for name in truth if name in draws]:
        expected, got = (num_draws, *truth[name].shape), tuple(draws[name].shape)
        if got != expected:
            raise ValueError(f"fit_one: expected draws of '{name}' of shape {expected}, got {got}")
        # ties are broken at random
        num_ties = (draws[name] == truth[name]).sum(0)
        by_chance = torch.rand_like(num_ties, dtype=torch.float64) * (num_ties + 1)
        num_below = (draws[name] < truth[name]).sum(0)
        ranks[name] = num_below + by_chance.long().minimum(num_ties)
    if not ranks:
        raise ValueError(f"fit_one: expected draws of {sorted(truth)}, got {sorted(draws)}")
    return ranks


def uniformity_pvalue(ranks: Tensor, num_draws: int) -> Tensor:
    r"""The p-value of a test of uniform ranks, based on the worst point of their distribution function.

    For uniform ranks the number of ranks up to r is binomial. The statistic is the smallest
    two-sided tail probability over r. Its p-value is exact, by a recursion over r.

    :param ranks: integers from 0 to ``num_draws``, of shape ``(S, K)``, for K quantities.
    :param num_draws: the largest possible rank.
    :return: shape ``(K,)``.

    **References**

    1. Graphical Test for Discrete Uniformity and Its Applications in Goodness of Fit Evaluation and
       Multiple Sample Comparison (Säilynoja, Bürkner, Vehtari, 2022),
       https://arxiv.org/abs/2103.10522
    """
    ranks = ranks.to("cpu")
    levels = _levels(num_draws)
    counts = torch.stack([(ranks < level * (num_draws + 1) - 0.5).sum(0) for level in levels])
    tails = _two_sided_tails(levels, len(ranks))
    worst = tails.gather(1, counts).amin(0)
    return _probability_of_reaching(worst * _ABOVE_TIES, tails, levels)


def simultaneous_bands(
    num_ranks: int, num_draws: int, level: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Simultaneous confidence bands for the distribution function of uniform ranks.

    :param num_ranks: the number of ranks, S.
    :param num_draws: the largest possible rank.
    :param level: the least probability that the whole function is between the bands.
    :return: points between 0 and 1, and the lower and upper bands there, each of shape ``(P,)``.
    """
    levels = _levels(num_draws)
    tails = _two_sided_tails(levels, num_ranks)
    candidates = list(tails[tails <= 1 - level].unique() * _ABOVE_TIES)
    reaching = partial(_probability_of_reaching, tails=tails, levels=levels)
    num_rare = bisect_right(candidates, 1 - level, key=lambda worst: float(reaching(worst[None])))
    inside = (tails > candidates[num_rare - 1] if num_rare else tails >= 0).long()
    lower, upper = inside.argmax(1), num_ranks - inside.flip(1).argmax(1)
    return levels, lower.to(levels) / num_ranks, upper.to(levels) / num_ranks


def _levels(num_draws: int) -> Tensor:
    """The distribution function of uniform ranks, at evenly spaced ranks."""
    num_points = min(num_draws, _MAX_POINTS)
    steps = torch.arange(1, num_points + 1, device="cpu")
    return (num_draws * steps // num_points).double() / (num_draws + 1)


def _two_sided_tails(levels: Tensor, num_ranks: int) -> Tensor:
    """Two-sided tail probabilities of each number of ranks up to each point, shape ``(P, S + 1)``."""
    hits = levels.new_ones(num_ranks + 1).cumsum(0) - 1
    mass = Binomial(num_ranks, levels[:, None]).log_prob(hits).exp()
    below, above = mass.cumsum(1), mass.flip(1).cumsum(1).flip(1)
    return (2 * below.minimum(above)).clamp(max=1)


def _probability_of_reaching(worst: Tensor, tails: Tensor, levels: Tensor) -> Tensor:
    """The probability that the worst tail probability of uniform ranks is at most ``worst``, ``(K,)``."""
    hits = levels.new_ones(tails.shape[1]).cumsum(0) - 1
    left = len(hits) - 1 - hits
    # transitions from the number of hits in a row to that in a column
    more = hits - hits[:, None]
    log_choices = (left[:, None] + 1).lgamma() - (more.clamp(min=0) + 1).lgamma()
    log_choices = torch.where(more >= 0, log_choices - (left + 1).lgamma(), -torch.inf)
    stayed = (hits == 0).to(levels).expand(len(worst), -1)
    before = levels.new_zeros(())
    for level, tail in zip(levels, tails):
        chance = (level - before) / (1 - before)
        log_step = more * chance.log() + left * (-chance).log1p()
        stayed = stayed @ (log_choices + log_step).exp() * (tail > worst[:, None])
        before = level
    return (1 - stayed.sum(1)).clamp(min=0, max=1)
