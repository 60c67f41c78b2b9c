# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Ten more posteriors that no number of a fit was made on, as users write them; data are simulated."""

from collections.abc import Callable

import pyro
import torch
from pyro import distributions as dist
from torch import Tensor
from unseen_models import Subject, generator


def proportions_model(x: Tensor, y: Tensor) -> None:
    """Beta regression, where the precision has a covariate too."""
    beta = pyro.sample("beta", dist.Normal(torch.zeros(4), 2.0).to_event(1))
    gamma = pyro.sample("gamma", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    mean, precision = torch.sigmoid(x @ beta), torch.exp(x[:, :2] @ gamma)
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Beta(mean * precision, (1 - mean) * precision), obs=y)


def proportions(num_rows: int = 60) -> Subject:
    by = generator(11)
    x = torch.cat([torch.ones(num_rows, 1), torch.randn(num_rows, 3, generator=by)], 1)
    noise = torch.exp(-0.5 + 0.4 * x[:, 1]) * torch.randn(num_rows, generator=by)
    y = torch.sigmoid(x @ torch.tensor([-1.0, 0.8, -0.4, 0.0]) + noise)
    return proportions_model, (x, y)


def visits_model(site: Tensor, num_sites: int, x: Tensor, y: Tensor) -> None:
    """Zero-inflated counts, with effects of sites on both the rate and the gate."""
    beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    gate = pyro.sample("gate", dist.Normal(0.0, 1.5))
    sd = pyro.sample("sd", dist.HalfNormal(torch.ones(2)).to_event(1))
    with pyro.plate("sites", num_sites):
        effect = pyro.sample("effect", dist.Normal(0.0, sd[..., 0]))
        absence = pyro.sample("absence", dist.Normal(gate, sd[..., 1]))
    rate = torch.exp(beta[..., 0] + beta[..., 1] * x + effect[..., site])
    with pyro.plate("visits", len(y)):
        pyro.sample("y", dist.ZeroInflatedPoisson(rate, gate_logits=absence[..., site]), obs=y)


def visits(num_sites: int = 18, num_visits: int = 144) -> Subject:
    by = generator(12)
    site, x = torch.arange(num_visits) % num_sites, torch.randn(num_visits, generator=by)
    effect, absence = torch.randn(2, num_sites, generator=by)
    is_there = torch.rand(num_visits, generator=by) < torch.sigmoid(0.5 - 0.8 * absence[site])
    y = torch.poisson(torch.exp(0.6 + 0.5 * x + 0.7 * effect[site]), by)
    return visits_model, (site, num_sites, x, y * is_there)


def curve_model(basis: Tensor, frequency: Tensor, y: Tensor) -> None:
    """A Gaussian process by eigenfunctions of the Laplacian, with noise that changes along it."""
    length = pyro.sample("length", dist.InverseGamma(3.0, 1.0))
    height = pyro.sample("height", dist.HalfNormal(2.0))
    noise = pyro.sample("noise", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    weights = pyro.sample("weights", dist.Normal(torch.zeros(len(frequency)), 1.0).to_event(1))
    density = height**2 * length * torch.exp(-0.5 * (length * frequency) ** 2)
    mean = basis @ (density.sqrt() * weights)
    x = torch.linspace(-1, 1, len(y))
    with pyro.plate("points", len(y)):
        pyro.sample("y", dist.Normal(mean, torch.exp(noise[0] + noise[1] * x)), obs=y)


def curve(num_points: int = 50, num_functions: int = 16, boundary: float = 1.5) -> Subject:
    x = torch.linspace(-1, 1, num_points)
    frequency = torch.arange(1, num_functions + 1) * torch.pi / (2 * boundary)
    basis = torch.sin((x[:, None] + boundary) * frequency) / boundary**0.5
    noise = torch.exp(-1.2 + 0.8 * x) * torch.randn(num_points, generator=generator(13))
    return curve_model, (basis, frequency, torch.sin(5 * x) * (1 - x) + noise)


def trees_model(age: Tensor, girth: Tensor) -> None:
    """Logistic growth of each tree, in millimetres and days."""
    loc = pyro.sample("loc", dist.Normal(torch.tensor([200.0, 700.0, 350.0]), 100.0).to_event(1))
    sd = pyro.sample("sd", dist.HalfNormal(torch.tensor([50.0, 100.0, 50.0])).to_event(1))
    noise = pyro.sample("noise", dist.HalfNormal(20.0))
    with pyro.plate("trees", girth.shape[1], dim=-1):
        limit = pyro.sample("limit", dist.Normal(loc[..., 0], sd[..., 0]))
        middle = pyro.sample("middle", dist.Normal(loc[..., 1], sd[..., 1]))
        scale = pyro.sample("scale", dist.Normal(loc[..., 2], sd[..., 2]))
        with pyro.plate("ages", len(age), dim=-2):
            mean = limit * torch.sigmoid((age[:, None] - middle) / scale)
            pyro.sample("girth", dist.Normal(mean, noise), obs=girth)


def trees(num_trees: int = 6) -> Subject:
    age, by = torch.tensor([120.0, 480.0, 660.0, 1000.0, 1230.0, 1370.0, 1580.0]), generator(14)
    limit, middle = torch.randn(2, num_trees, generator=by)
    mean = (195 + 30 * limit) * torch.sigmoid((age[:, None] - 730 - 50 * middle) / 350)
    return trees_model, (age, mean + 8 * torch.randn(mean.shape, generator=by))


def cycle_model(y: Tensor) -> None:
    """An autoregression of order two around a line."""
    level = pyro.sample("level", dist.Normal(0.0, 10.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    phi1 = pyro.sample("phi1", dist.Normal(0.0, 1.0))
    phi2 = pyro.sample("phi2", dist.Normal(0.0, 1.0))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.0))
    away = y - level - slope * torch.arange(len(y))
    mean = phi1 * away[..., 1:-1] + phi2 * away[..., :-2]
    with pyro.plate("times", len(y) - 2):
        pyro.factor("y", dist.Normal(mean, sigma).log_prob(away[..., 2:]))


def cycle(length: int = 80) -> Subject:
    away = [torch.tensor(0.0), torch.tensor(0.0)]
    for noise in torch.randn(length - 2, generator=generator(15)):
        away.append(1.4 * away[-1] - 0.6 * away[-2] + noise)
    return cycle_model, (3 + 0.05 * torch.arange(length) + torch.stack(away),)


def factors_model(y: Tensor) -> None:
    """Two factors of each person; loadings are zero above the diagonal and positive on it."""
    num_persons, num_items = y.shape
    diagonal = pyro.sample("diagonal", dist.HalfNormal(torch.ones(2)).to_event(1))
    free = dist.Normal(torch.zeros(2 * num_items - 3), 1.0).to_event(1)
    below = pyro.sample("below", free)
    noise = pyro.sample("noise", dist.HalfNormal(torch.ones(num_items)).to_event(1))
    first = torch.cat([diagonal[:1], below[: num_items - 1]])
    second = torch.cat([torch.zeros(1), diagonal[1:], below[num_items - 1 :]])
    with pyro.plate("persons", num_persons):
        factor = pyro.sample("factor", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        mean = factor @ torch.stack([first, second])
        pyro.sample("y", dist.Normal(mean, noise).to_event(1), obs=y)


def factors(num_persons: int = 28) -> Subject:
    by = generator(16)
    loadings = torch.tensor([[0.9, 0.8, 0.6, 0.1, 0.3, -0.4], [0.0, 0.5, 0.1, 0.9, 0.7, 0.5]])
    y = torch.randn(num_persons, 2, generator=by) @ loadings
    return factors_model, (y + 0.5 * torch.randn(y.shape, generator=by),)


def outliers_model(x: Tensor, y: Tensor) -> None:
    """Robust regression whose degrees of freedom are unknown."""
    beta = pyro.sample("beta", dist.Normal(torch.zeros(4), 10.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(1.0))
    df = pyro.sample("df", dist.Gamma(2.0, 0.1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.StudentT(df, x @ beta, sigma), obs=y)


def outliers(num_rows: int = 35) -> Subject:
    by = generator(17)
    x = torch.cat([torch.ones(num_rows, 1), torch.randn(num_rows, 3, generator=by)], 1)
    noise, scale = torch.randn(2, num_rows, generator=by)
    y = x @ torch.tensor([2.0, 1.0, -0.5, 0.0]) + 0.5 * noise / scale.abs().sqrt()
    return outliers_model, (x, y)


def crossed_model(
    judge: Tensor, num_judges: int, item: Tensor, num_items: int, total: Tensor, y: Tensor
) -> None:
    """Overdispersed successes, with effects of judges and of items."""
    intercept = pyro.sample("intercept", dist.Normal(0.0, 1.5))
    sd_judge = pyro.sample("sd_judge", dist.Exponential(1.0))
    sd_item = pyro.sample("sd_item", dist.Exponential(1.0))
    precision = pyro.sample("precision", dist.Gamma(2.0, 0.1))
    with pyro.plate("judges", num_judges):
        of_judge = pyro.sample("of_judge", dist.Normal(0.0, sd_judge))
    with pyro.plate("items", num_items):
        of_item = pyro.sample("of_item", dist.Normal(0.0, sd_item))
    mean = torch.sigmoid(intercept + of_judge[..., judge] + of_item[..., item])
    with pyro.plate("pairs", len(y)):
        successes = dist.BetaBinomial(mean * precision, (1 - mean) * precision, total)
        pyro.sample("y", successes, obs=y)


def crossed(num_judges: int = 10, num_items: int = 14) -> Subject:
    by, num_pairs = generator(18), num_judges * num_items
    judge, item = torch.arange(num_pairs) % num_judges, torch.arange(num_pairs) // num_judges
    of_judge = 0.3 * torch.randn(num_judges, generator=by)[judge]
    of_item = 0.9 * torch.randn(num_items, generator=by)[item]
    noise = 0.5 * torch.randn(num_pairs, generator=by)
    total = torch.randint(3, 15, (num_pairs,), generator=by).to(noise)
    y = torch.binomial(total, torch.sigmoid(0.4 + of_judge + of_item + noise), by)
    return crossed_model, (judge, num_judges, item, num_items, total, y)


def change_model(y: Tensor) -> None:
    """Counts whose rate changes once; when, is a softmax of a logit of each year."""
    early = pyro.sample("early", dist.Gamma(2.0, 1.0))
    late = pyro.sample("late", dist.Gamma(2.0, 1.0))
    logits = pyro.sample("logits", dist.Normal(torch.zeros(len(y)), 3.0).to_event(1))
    is_late = torch.softmax(logits, -1).cumsum(-1)
    with pyro.plate("years", len(y)):
        pyro.sample("y", dist.Poisson(early + (late - early) * is_late), obs=y)


def change(num_years: int = 50, when: int = 22) -> Subject:
    rate = torch.where(torch.arange(num_years) < when, 3.2, 1.0)
    return change_model, (torch.poisson(rate, generator(19)),)


def slopes_model(group: Tensor, num_groups: int, x: Tensor, y: Tensor) -> None:
    """An intercept and two slopes of each group, correlated."""
    loc = pyro.sample("loc", dist.Normal(torch.zeros(3), 5.0).to_event(1))
    sd = pyro.sample("sd", dist.HalfNormal(2.0 * torch.ones(3)).to_event(1))
    corr = pyro.sample("corr", dist.LKJCholesky(3, 2.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0))
    with pyro.plate("groups", num_groups):
        scale_tril = sd[..., None] * corr
        effects = pyro.sample("effects", dist.MultivariateNormal(loc, scale_tril=scale_tril))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal((x * effects[..., group, :]).sum(-1), sigma), obs=y)


def slopes(num_groups: int = 14, num_rows: int = 112) -> Subject:
    by = generator(20)
    group = torch.arange(num_rows) % num_groups
    x = torch.cat([torch.ones(num_rows, 1), torch.randn(num_rows, 2, generator=by)], 1)
    mix = torch.tensor([[1.0, 0.0, 0.0], [-0.5, 0.6, 0.0], [0.1, 0.1, 0.2]])
    effects = torch.tensor([2.0, -1.0, 0.5]) + torch.randn(num_groups, 3, generator=by) @ mix.T
    y = (x * effects[group]).sum(1) + torch.randn(num_rows, generator=by)
    return slopes_model, (group, num_groups, x, y)


MODELS: dict[str, Callable[[], Subject]] = {
    made.__name__: made
    for made in (
        *(proportions, visits, curve, trees, cycle),
        *(factors, outliers, crossed, change, slopes),
    )
}
