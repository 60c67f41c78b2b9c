# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Latents in crossed plates under many likelihoods and priors, for fits by mini-batches."""

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

NUM_ROWS, NUM_USERS, NUM_ITEMS = 6000, 150, 200
Rows = tuple[Tensor, Tensor, Tensor, Tensor]
Model = Callable[[Tensor, Tensor, Tensor, Tensor], None]
Simulated = tuple[Model, Rows]

_half, _normal = dist.HalfNormal(1.0), dist.Normal(0.0, 1.0)


def _effects(site: str, plate: str, size: int, effect: dist.Distribution) -> Tensor:
    with pyro.plate(plate, size):
        found: Tensor = pyro.sample(site, effect)
    return found


def _users(effect: dist.Distribution, site: str = "a") -> Tensor:
    return _effects(site, "users", NUM_USERS, effect)


def _items(effect: dist.Distribution, site: str = "b") -> Tensor:
    return _effects(site, "items", NUM_ITEMS, effect)


def _rows(law: dist.Distribution, y: Tensor) -> None:
    with pyro.plate("rows", NUM_ROWS, subsample_size=len(y)):
        pyro.sample("y", law, obs=y)


def crossed(likelihood: Callable[..., dist.Distribution], **priors: dist.Distribution) -> Model:
    """Users and items, and a likelihood of their sum and of parameters with these priors."""

    def model(user: Tensor, item: Tensor, x: Tensor, y: Tensor) -> None:
        mu, su = pyro.sample("mu", dist.Normal(0.0, 2.0)), pyro.sample("su", _half)
        si = pyro.sample("si", _half)
        others = [pyro.sample(name, prior) for name, prior in priors.items()]
        a, b = _users(dist.Normal(0.0, su)), _items(dist.Normal(0.0, si))
        _rows(likelihood(mu + a[..., user] + b[..., item], *others), y)

    return model


def vague(user: Tensor, item: Tensor, x: Tensor, y: Tensor) -> None:
    wide = dist.HalfCauchy(2.5)
    mu = pyro.sample("mu", dist.StudentT(3.0, 0.0, 2.5))
    su, si, s = (pyro.sample(name, wide) for name in ("su", "si", "s"))
    a, b = _users(dist.Normal(mu, su)), _items(dist.Normal(0.0, si))
    _rows(dist.Normal(a[..., user] + b[..., item], s), y)


def non_centred(user: Tensor, item: Tensor, x: Tensor, y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    su, si, s = (pyro.sample(name, dist.Exponential(1.0)) for name in ("su", "si", "s"))
    a, b = _users(_normal), _items(_normal)
    _rows(dist.Normal(mu + su * a[..., user] + si * b[..., item], s), y)


def slopes(user: Tensor, item: Tensor, x: Tensor, y: Tensor) -> None:
    mu, beta = pyro.sample("mu", dist.Normal(0.0, 2.0)), pyro.sample("beta", _normal)
    s, sd = pyro.sample("s", _half), pyro.sample("sd", dist.HalfNormal(torch.ones(2)).to_event(1))
    lower = sd[..., :, None] * pyro.sample("L", dist.LKJCholesky(2, 2.0))
    u = _users(dist.MultivariateNormal(torch.zeros(2), scale_tril=lower))
    _rows(dist.Normal(mu + u[..., user, 0] + (beta + u[..., user, 1]) * x, s), y)


def teams(user: Tensor, item: Tensor, x: Tensor, y: Tensor) -> None:
    """Matches of users: each row reads two elements of a plate."""
    sd, home = pyro.sample("sd", _half), pyro.sample("home", _normal)
    skill = _users(dist.Normal(0.0, sd), "skill")
    _rows(dist.Bernoulli(logits=home + skill[..., user] - skill[..., item % NUM_USERS]), y)


def item_responses(user: Tensor, item: Tensor, x: Tensor, y: Tensor) -> None:
    sb, mb, sa = pyro.sample("sb", _half), pyro.sample("mb", _normal), pyro.sample("sa", _half)
    ability = _users(_normal, "ability")
    with pyro.plate("items", NUM_ITEMS):
        b = pyro.sample("b", dist.Normal(mb, sb))
        a = pyro.sample("slope", dist.LogNormal(0.0, sa))
    _rows(dist.Bernoulli(logits=a[..., item] * (ability[..., user] - b[..., item])), y)


def ordered(user: Tensor, item: Tensor, x: Tensor, y: Tensor) -> None:
    su, si = pyro.sample("su", _half), pyro.sample("si", _half)
    base = dist.Normal(torch.zeros(3), 2.0).to_event(1)
    cut = pyro.sample("cut", dist.TransformedDistribution(base, dist.transforms.OrderedTransform()))
    a, b = _users(dist.Normal(0.0, su)), _items(dist.Normal(0.0, si))
    _rows(dist.OrderedLogistic(a[..., user] + b[..., item], cut), y)


def make(name: str) -> Simulated:
    """A model by name with simulated rows: users, items, a covariate and data."""
    torch.manual_seed(5)
    user, item = torch.randint(NUM_USERS, (NUM_ROWS,)), torch.randint(NUM_ITEMS, (NUM_ROWS,))
    x, noise = torch.randn(2, NUM_ROWS)
    a, b, slope = 0.6 * torch.randn(NUM_USERS), 0.8 * torch.randn(NUM_ITEMS), torch.randn(NUM_USERS)
    eta = a[user] + b[item]
    mean = (0.7 * eta).exp()
    shape = {"shape": dist.Gamma(2.0, 0.5)}
    models: dict[str, Model] = {
        "normal, vague priors": vague,
        "normal, non-centred": non_centred,
        "correlated slopes": slopes,
        "Student's t": crossed(
            lambda m, s, nu: dist.StudentT(nu, m, s), s=_half, nu=dist.Gamma(2.0, 0.1)
        ),
        "Poisson": crossed(lambda m: dist.Poisson(m.exp())),
        "negative binomial": crossed(lambda m, c: dist.GammaPoisson(c, c / m.exp()), **shape),
        "gamma": crossed(lambda m, c: dist.Gamma(c, c * (-m).exp()), **shape),
        "ordered logistic": ordered,
        "teams": teams,
        "item responses": item_responses,
    }
    data = {
        "correlated slopes": a[user] + (0.5 + 0.4 * slope[user]) * x + 0.7 * noise,
        "Student's t": eta + 0.5 * dist.StudentT(3.0).sample((NUM_ROWS,)),
        "Poisson": torch.poisson(mean),
        "negative binomial": torch.poisson(mean * dist.Gamma(3.0, 3.0).sample((NUM_ROWS,))),
        "gamma": dist.Gamma(3.0, 3.0 * (-eta).exp()).sample(),
        "ordered logistic": torch.bucketize(
            eta + torch.rand(NUM_ROWS).logit(), torch.tensor([-1.0, 0.0, 1.2])
        ).float(),
        "teams": torch.bernoulli((0.2 + a[user] - a[item % NUM_USERS]).sigmoid()),
        "item responses": torch.bernoulli(
            ((0.3 * b[item]).exp() * (a[user] / 0.6 - b[item])).sigmoid()
        ),
    }
    return models[name], (user, item, x, data.get(name, eta + noise))


NAMES = (
    *("normal, vague priors", "normal, non-centred", "correlated slopes", "Student's t", "Poisson"),
    *("negative binomial", "gamma", "ordered logistic", "teams", "item responses"),
)
