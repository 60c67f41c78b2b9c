# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Simulation-based calibration: whether posteriors of simulated data are right on average."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import Predictive
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.util import site_is_factor, site_is_subsample
from torch import Tensor

from ..arguments import check_integer
from ..joint.handlers import SimulatedData
from ..joint.protocols import PosteriorGuide
from ..joint.traces import is_deterministic

Values = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class SBC:
    """The ranks of true values among draws of the posteriors of their data.

    :param ranks: for each site integers from 0 to ``num_draws``, of shape ``(num_simulations,) +
        site shape``; uniform if the posteriors are right.
    :param num_draws: the number of draws of each posterior.
    """

    ranks: Values
    num_draws: int

    @property
    def num_simulations(self) -> int:
        """The number of simulated data sets."""
        return len(next(iter(self.ranks.values())))

    def pvalues(self) -> Values:
        """The p-value of uniform ranks for each coordinate, by site, each of the site's shape.

        It is that of :func:`~pyro_artransform.diagnostics.uniformity_pvalue`.
        """
        flat = [ranks.reshape(self.num_simulations, -1) for ranks in self.ranks.values()]
        # of all at once, which share most of the work
        pvalues = uniformity_pvalue(torch.cat(flat, 1), self.num_draws)
        parts = pvalues.split([ranks.shape[1] for ranks in flat])
        return {k: part.reshape(self.ranks[k].shape[1:]) for k, part in zip(self.ranks, parts)}

    def passed(self, alpha: float = 0.01) -> bool:
        """Whether no coordinate's ranks depart from uniform ones.

        :param alpha: the probability that right posteriors fail, over all coordinates together
            (Bonferroni's bound).
        """
        pvalues = torch.cat([value.flatten() for value in self.pvalues().values()])
        return bool((pvalues * len(pvalues)).min() >= alpha)

    def coverage(self, levels: Sequence[float] | Tensor = (0.5, 0.9)) -> Values:
        """The share of true values in central intervals; for right posteriors it is the level.

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
        pvalues, coverage = self.pvalues(), self.coverage((0.5, 0.9))
        width = max(map(len, ["site", *self.ranks]))
        result = "passed" if self.passed() else "failed"
        lines = [
            f"SBC of {self.num_simulations} simulations, {self.num_draws} draws each: {result}",
            f"{'site':{width}}  smallest p-value  coverage of 50 %, of 90 %",
        ]
        for name, pvalue in pvalues.items():
            half, most = (100 * coverage[name].reshape(2, -1).mean(1)).tolist()
            lines.append(
                f"{name:{width}}  {pvalue.min().item():16.4f}  {half:14.1f} %, {most:.1f} %"
            )
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
    """Simulation-based calibration of a method that computes posteriors of a model.

    Latents and data are drawn from the model, a posterior is computed from the data alone, and the
    latents are ranked among its draws. Over many simulations the ranks are uniform if posteriors are
    right. This finds posteriors that are too narrow, too wide or biased on average over the prior; a
    posterior that ignores its data and equals the prior passes too.

    The data sites are those that have data when the model runs with the arguments given here (the
    real data, which are not used otherwise), or those in ``observed``, for a model that draws its
    data where it is given none.

    :param model: a Pyro model without factors, which cannot be simulated from.
    :param fit_one: takes a dict of simulated data by site, and returns the posterior: a guide; a
        dict of draws by site, each of shape ``(num_draws,) + site shape``, independent ones; or a
        function of the number of draws that returns such a dict. Deterministic sites that have draws
        are ranked, too. It runs with a param store of its own, empty at first.
    :param args: the model's arguments.
    :param num_simulations: the number of simulated data sets.
    :param num_draws: the number of draws of each posterior; ranks go from 0 to it.
    :param observed: the names of the data sites.
    :param seed: the seed of Pyro's generators, which is set.
    :param progress: whether to show a progress bar.
    :param kwargs: the model's keyword arguments.
    :raises ValueError: if a number is not positive, the model has no such data sites or has factors,
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
    ranks: dict[str, list[Tensor]] = {}
    for _ in trange(num_simulations, disable=not progress):
        sites = _sites(SimulatedData()(run))
        data = {name: sites[name]["value"] for name in sites if name in names}
        truth = {name: sites[name]["value"] for name in sites if name not in names}
        with pyro.get_param_store().scope():
            draws = _draws_of(fit_one(data), num_draws, truth, args, kwargs)
        for name, rank in _ranks(truth, draws, num_draws).items():
            ranks.setdefault(name, []).append(rank)
    return SBC({name: torch.stack(found) for name, found in ranks.items()}, num_draws)


@torch.no_grad()
def _sites(run: Callable[[], object]) -> dict[str, Any]:
    """The sample sites of a run, without indices of plates."""
    with poutine.block():
        nodes = poutine.trace(run).get_trace().nodes
    sampled = [k for k in nodes if nodes[k]["type"] == "sample"]
    return {name: nodes[name] for name in sampled if not site_is_subsample(nodes[name])}


def _data_sites(run: Callable[[], object], observed: Iterable[str] | None) -> set[str]:
    """The names of the sites that have data, and of those in ``observed``."""
    sites = {k: site for k, site in _sites(run).items() if not is_deterministic(site)}
    factors = [name for name, site in sites.items() if site_is_factor(site)]
    if factors:
        raise ValueError(
            f"model: expected one to simulate from, got one with the factors {factors}"
        )
    names = {k for k, site in sites.items() if site["is_observed"]} | set(observed or ())
    if not names <= sites.keys():
        unknown = sorted(names - sites.keys())
        raise ValueError(f"observed: expected sites of {sorted(sites)}, got {unknown}")
    if not names:
        raise ValueError(
            "observed: expected the names of the data sites of a model that has no data here, or a "
            "model that is given its data"
        )
    return names


@torch.no_grad()
def _draws_of(
    posterior: object,
    num_draws: int,
    truth: Values,
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
) -> Mapping[str, Tensor]:
    """Draws of what ``fit_one`` has returned."""
    if isinstance(posterior, PosteriorGuide):
        posterior = posterior.sample_posterior(num_draws)
    elif isinstance(posterior, AutoGuide):
        drawn = Predictive(posterior, num_samples=num_draws)(*args, **kwargs)
        # Predictive puts a dimension in place of each plate that a site is not in
        shapes = {name: (num_draws, *truth[name].shape) for name in truth if name in drawn}
        posterior = {name: drawn[name].reshape(shape) for name, shape in shapes.items()}
    elif callable(posterior):
        posterior = posterior(num_draws)
    if isinstance(posterior, Mapping):
        return posterior
    raise TypeError(
        "fit_one: expected a guide, a dict of draws, or a function that returns one, got "
        f"{type(posterior).__name__}"
    )


def _ranks(truth: Values, draws: Mapping[str, Tensor], num_draws: int) -> Values:
    """For each coordinate the number of draws below the truth."""
    names = [name for name in truth if name in draws]
    if not names:
        raise ValueError(f"fit_one: expected draws of {sorted(truth)}, got {sorted(draws)}")
    found = {}
    for name in names:
        expected, got = (num_draws, *truth[name].shape), tuple(draws[name].shape)
        if got != expected:
            raise ValueError(f"fit_one: expected draws of '{name}' of shape {expected}, got {got}")
        # ties go either way by chance
        num_ties = (draws[name] == truth[name]).sum(0)
        by_chance = torch.rand_like(num_ties, dtype=torch.float64) * (num_ties + 1)
        num_below = (draws[name] < truth[name]).sum(0)
        found[name] = num_below + by_chance.long().minimum(num_ties)
    return found


_MAX_POINTS = 100
_AT_A_TIME = 64
# ties count as being as far out as the worst point, despite round-off
_ABOVE_TIES = 1 + 1e-9


def uniformity_pvalue(ranks: Tensor, num_draws: int) -> Tensor:
    r"""The p-value of uniform ranks, by the point where their distribution function fits worst.

    The number of ranks up to r is binomial if ranks are uniform. The statistic is the smallest
    two-sided binomial tail probability over r. Its p-value is the probability that these numbers are
    as far out at any r, which a recursion over r gives exactly.

    :param ranks: integers from 0 to ``num_draws``, of shape ``(S, K)``: S ranks of each of K
        quantities.
    :param num_draws: the largest rank.
    :return: shape ``(K,)``.

    **References**

    1. Graphical Test for Discrete Uniformity and Its Applications in Goodness of Fit Evaluation and
       Multiple Sample Comparison (Säilynoja, Bürkner, Vehtari, 2022),
       https://arxiv.org/abs/2103.10522
    """
    ranks = ranks.to("cpu")
    points = _points(num_draws)
    counts = torch.stack([(ranks <= point).sum(0) for point in points])
    levels = (points + 1) / (num_draws + 1)
    tails = _two_sided_tails(levels, len(ranks))
    worst = tails.gather(1, counts.long()).amin(0)
    return _probability_of_reaching(worst * _ABOVE_TIES, tails, levels)


def simultaneous_bands(
    num_ranks: int, num_draws: int, level: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Simultaneous confidence bands of the distribution function of uniform ranks.

    :param num_ranks: the number of ranks, S.
    :param num_draws: the largest rank.
    :param level: the least probability that the whole function is between the bands.
    :return: points between 0 and 1, and the lower and the upper proportion of ranks there, each of
        shape ``(P,)``.
    """
    levels = (_points(num_draws) + 1) / (num_draws + 1)
    tails = _two_sided_tails(levels, num_ranks)
    inside = (tails > _largest_rare(tails, levels, 1 - level)).long()
    lower = inside.argmax(1)
    upper = inside.shape[1] - 1 - inside.flip(1).argmax(1)
    return levels, lower.to(levels) / num_ranks, upper.to(levels) / num_ranks


def _largest_rare(tails: Tensor, levels: Tensor, alpha: float) -> Tensor:
    """The largest tail probability that is the worst one at most this often; -1 if there is none."""
    candidates = tails.flatten().unique()
    candidates = candidates[candidates <= alpha] * _ABOVE_TIES
    found = candidates.new_tensor(-1.0)
    while len(candidates):
        spread = torch.linspace(0, 1, _AT_A_TIME, dtype=torch.float64, device="cpu")
        chosen = (spread * (len(candidates) - 1)).long().unique()
        rare = _probability_of_reaching(candidates[chosen], tails, levels) <= alpha
        num_rare = int(rare.sum())
        if not num_rare:
            break
        found = candidates[chosen[num_rare - 1]]
        # what is left is between this one and the next
        end = chosen[num_rare] if num_rare < len(chosen) else 0
        candidates = candidates[chosen[num_rare - 1] + 1 : end]
    return found


def _points(num_draws: int) -> Tensor:
    """Ranks, all of them or evenly spaced ones, at which distribution functions are compared."""
    num_points = min(num_draws, _MAX_POINTS)
    steps = torch.arange(1, num_points + 1, device="cpu")
    return (num_draws * steps // num_points - 1).double()


def _log_choices(num: Tensor, hits: Tensor) -> Tensor:
    """Log binomial coefficients, ``-inf`` where there are none."""
    left = (num - hits).clamp(min=0)
    choices = (num + 1).lgamma() - (hits.clamp(min=0) + 1).lgamma() - (left + 1).lgamma()
    return torch.where((hits >= 0) & (hits <= num), choices, -torch.inf)


def _two_sided_tails(levels: Tensor, num_ranks: int) -> Tensor:
    """Tail probabilities of each number of ranks up to each point, shape ``(P, S + 1)``."""
    hits = levels.new_ones(num_ranks + 1).cumsum(0) - 1
    probability = levels[:, None]
    log_mass = hits * probability.log() + (num_ranks - hits) * (-probability).log1p()
    mass = (_log_choices(levels.new_tensor(num_ranks), hits) + log_mass).exp()
    below, above = mass.cumsum(1), mass.flip(1).cumsum(1).flip(1)
    return (2 * below.minimum(above)).clamp(max=1)


def _probability_of_reaching(worst: Tensor, tails: Tensor, levels: Tensor) -> Tensor:
    """The probability that the worst tail probability of uniform ranks is so small, shape ``(K,)``."""
    num_ranks = tails.shape[1] - 1
    hits = levels.new_ones(num_ranks + 1).cumsum(0) - 1
    # from as many hits as a row says to as many as a column says
    log_choices = _log_choices(num_ranks - hits[:, None], hits - hits[:, None])
    stayed = levels.new_zeros(len(worst), num_ranks + 1)
    stayed[:, 0] = 1
    before = levels.new_zeros(())
    for level, tail in zip(levels, tails):
        chance = (level - before) / (1 - before)
        log_step = (hits - hits[:, None]) * chance.log() + (num_ranks - hits) * (-chance).log1p()
        stayed = stayed @ (log_choices + log_step).exp() * (tail > worst[:, None])
        before = level
    return (1 - stayed.sum(1)).clamp(min=0, max=1)
