# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Ratings of users and items, with latents in crossed plates: model, data, exact draws and evidence."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

_LOC = 3.5  # the prior mean of mu, whose sd is 1, as are the scales of the half-normal priors


class Ratings(NamedTuple):
    """Rows ``(n,)``: the indices of users and items, and the ratings; 1 and 0 if they are binary."""

    user: Tensor
    item: Tensor
    y: Tensor

    @classmethod
    def simulate(cls, num_users: int, num_items: int, num_rows: int, is_binary: bool) -> "Ratings":
        generator = torch.Generator().manual_seed(1)
        user = torch.randint(num_users, (num_rows,), generator=generator)
        item = torch.randint(num_items, (num_rows,), generator=generator)
        a = 0.5 * torch.randn(num_users, generator=generator)
        b = 0.8 * torch.randn(num_items, generator=generator)
        mean = a[user] + b[item]
        if is_binary:
            return cls(user, item, torch.bernoulli((0.5 + mean).sigmoid(), generator=generator))
        return cls(user, item, _LOC + mean + 0.9 * torch.randn(num_rows, generator=generator))


@dataclass(frozen=True)
class Crossed:
    """The model of all ratings, which sees some of them: a mini-batch."""

    num_users: int
    num_items: int
    num_rows: int
    is_binary: bool = False

    def __call__(self, user: Tensor, item: Tensor, y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0 if self.is_binary else _LOC, 1.0))
        su = pyro.sample("su", dist.HalfNormal(1.0))
        si = pyro.sample("si", dist.HalfNormal(1.0))
        s = None if self.is_binary else pyro.sample("s", dist.HalfNormal(1.0))
        with pyro.plate("users", self.num_users):
            a = pyro.sample("a", dist.Normal(0.0, su))
        with pyro.plate("items", self.num_items):
            b = pyro.sample("b", dist.Normal(0.0, si))
        with pyro.plate("ratings", self.num_rows, subsample_size=len(y)):
            mean = mu + a[user] + b[item]
            of_rating = dist.Bernoulli(logits=mean) if s is None else dist.Normal(mean, s)
            pyro.sample("y", of_rating, obs=y)

    def data(self) -> Ratings:
        return Ratings.simulate(self.num_users, self.num_items, self.num_rows, self.is_binary)


class Moments(NamedTuple):
    """Means and sds by site, and the log evidence with its standard error."""

    mean: dict[str, Tensor]
    sd: dict[str, Tensor]
    log_evidence: float
    log_evidence_se: float


def exact(model: Crossed, data: Ratings, num_sweeps: int = 6000) -> Moments:
    """Moments by a Gibbs sampler, and the evidence given scales in closed form, integrated over them."""
    draws, (mean, variance) = _gibbs(model, data, num_sweeps)
    own = {name: draws[:, k] for k, name in enumerate(("mu", "su", "si", "s"))}
    mean = {**{name: v.mean() for name, v in own.items()}, **mean}
    sd = {name: v.std() for name, v in own.items()} | {k: v.sqrt() for k, v in variance.items()}
    return Moments(mean, sd, *_evidence(model, data, draws[:, 1:].log()))


def _gibbs(model: Crossed, data: Ratings, num_sweeps: int) -> tuple[Tensor, tuple[dict, dict]]:
    """Draws of mu, su, si, s, ``(n, 4)``; means and variances of a and b by their conditional moments."""
    user, item, y = data.user, data.item, data.y.double()
    generator = torch.Generator().manual_seed(0)
    sizes = {"a": model.num_users, "b": model.num_items}
    index, x = {"a": user, "b": item}, {k: torch.zeros(n).double() for k, n in sizes.items()}
    counts = {k: torch.bincount(index[k], minlength=n) for k, n in sizes.items()}
    scale, s, mu, kept = {"a": 1.0, "b": 1.0}, 1.0, _LOC, list[list[float]]()
    sums = {k: torch.zeros(3, n).double() for k, n in sizes.items()}

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def new_scale(old: float, count: int, squares: float) -> float:
        """A Metropolis step with the inverse gamma of a flat prior on the scale as its proposal."""
        shape = torch.tensor(0.5 * (count - 1)).double()
        new = 0.5 * squares / torch._standard_gamma(shape, generator=generator).item()
        accept = math.exp(min(0.5 * (old**2 - new), 0.0))
        return math.sqrt(new) if torch.rand((), generator=generator).item() < accept else old

    for sweep in range(num_sweeps + num_sweeps // 10):
        is_kept = sweep >= num_sweeps // 10
        for k, other in (("a", "b"), ("b", "a")):
            residual = y - mu - x[other][index[other]]
            precision = counts[k] / s**2 + scale[k] ** -2
            total = torch.bincount(index[k], residual, minlength=sizes[k])
            center = total / s**2 / precision
            x[k] = center + normal(sizes[k]) / precision.sqrt()
            if is_kept:
                sums[k] += torch.stack([center, center**2, 1 / precision])
        residual = y - x["a"][user] - x["b"][item]
        precision = len(y) / s**2 + 1
        mu = float((residual.sum() / s**2 + _LOC) / precision + normal() / math.sqrt(precision))
        for k in x:  # moves mu and all elements of a plate in opposite directions
            precision = 1 + sizes[k] / scale[k] ** 2
            center = (mu - _LOC - float(x[k].sum()) / scale[k] ** 2) / precision
            shift = float(center + normal() / math.sqrt(precision))
            mu, x[k] = mu - shift, x[k] + shift
        squares = float((y - mu - x["a"][user] - x["b"][item]).square().sum())
        s = new_scale(s, len(y), squares)
        scale = {k: new_scale(scale[k], sizes[k], float(x[k].square().sum())) for k in x}
        if is_kept:
            kept.append([mu, scale["a"], scale["b"], s])
    mean = {k: total[0] / num_sweeps for k, total in sums.items()}
    variance = {k: (total[1] + total[2]) / num_sweeps - mean[k] ** 2 for k, total in sums.items()}
    return torch.tensor(kept, dtype=torch.float64), (mean, variance)


def _evidence(
    model: Crossed, data: Ratings, log_scales: Tensor, count: int = 64
) -> tuple[float, float]:
    """The log evidence and its standard error, by importance sampling of the logs of scales ``(n, 3)``."""
    proposal = dist.MultivariateNormal(log_scales.mean(0), log_scales.T.cov())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draws = proposal.sample((count,))
    prior = dist.HalfNormal(torch.ones(3).double())
    log_prior = prior.log_prob(draws.exp()).sum(-1) + draws.sum(-1)
    likelihood = torch.stack([_log_likelihood(model, data, own) for own in draws.exp()])
    weights = likelihood + log_prior - proposal.log_prob(draws)
    relative = (weights - weights.max()).exp()
    error = relative.std() / relative.mean() / math.sqrt(count)
    return float(weights.logsumexp(0) - math.log(count)), float(error)


def _log_likelihood(model: Crossed, data: Ratings, scales: Tensor) -> Tensor:
    """The log likelihood of su, si and s, with mu, a and b integrated out."""
    su, si, s = scales
    num_users, num_items = model.num_users, model.num_items
    dim, y = 1 + num_users + num_items, data.y.double() - _LOC
    prior_sd = torch.cat([torch.ones(1).double(), su.expand(num_users), si.expand(num_items)])
    precision = torch.zeros(dim, dim).double()
    rows = torch.zeros_like(data.user), 1 + data.user, 1 + num_users + data.item
    right = torch.zeros(dim).double()
    for own in rows:
        right.index_add_(0, own, y)
        for other in rows:
            ones = torch.ones(len(y)).double()
            precision.view(-1).index_add_(0, own * dim + other, ones)
    lower = torch.linalg.cholesky(precision / s**2 + prior_sd**-2 * torch.eye(dim).double())
    half = torch.linalg.solve_triangular(lower, right[:, None] / s**2, upper=False)
    log_det = 2 * lower.diagonal().log().sum() + 2 * prior_sd.log().sum()
    quadratic = y.square().sum() / s**2 - half.square().sum()
    return -0.5 * (quadratic + log_det + len(y) * (2 * math.pi * s**2).log())
