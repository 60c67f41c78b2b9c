# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Ten posteriors that no number of a fit was made on, as users write them; data are simulated.

Five are like posteriors of posteriordb (https://github.com/stan-dev/posteriordb) by their descriptions
there: dogs, seeds, poisson_process, dugongs and rats. The other five are common in applied work.
"""

from collections.abc import Callable

import pyro
import torch
from pyro import distributions as dist
from pyro.distributions.transforms import OrderedTransform
from torch import Tensor

from models.library import Subject


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def dogs_model(avoided: Tensor, shocked: Tensor, y: Tensor) -> None:
    """Learning to avoid a shock: a logistic regression on the numbers of trials of either end."""
    beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 10.0).to_event(1))
    logits = beta[..., 0] + beta[..., 1] * avoided + beta[..., 2] * shocked
    with pyro.plate("trials", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)


def dogs(num_dogs: int = 30, num_trials: int = 25) -> Subject:
    noise, rows = torch.rand(num_trials, num_dogs, generator=generator(1)), []
    avoided, shocked = torch.zeros(2, num_dogs)
    for trial in noise:
        y = (trial < torch.sigmoid(2.0 - 0.35 * avoided - 0.2 * shocked)).to(noise)
        rows.append(torch.stack([avoided, shocked, y]))
        avoided, shocked = avoided + 1 - y, shocked + y
    return dogs_model, tuple(torch.cat(rows, 1))


def seeds_model(kind: Tensor, extract: Tensor, total: Tensor, y: Tensor) -> None:
    """Seeds that germinate on plates: a binomial regression with an effect of each plate."""
    beta = pyro.sample("beta", dist.Normal(torch.zeros(4), 3.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(1.0))
    logits = beta[..., 0] + beta[..., 1] * kind + beta[..., 2] * extract
    logits = logits + beta[..., 3] * kind * extract
    with pyro.plate("plates", len(y)):
        effect = pyro.sample("effect", dist.Normal(0.0, sigma))
        pyro.sample("y", dist.Binomial(total, logits=logits + effect), obs=y)


def seeds(num_plates: int = 21) -> Subject:
    by = generator(2)
    kind = (torch.arange(num_plates) % 2).to(torch.get_default_dtype())
    extract = (torch.arange(num_plates) // 2 % 2).to(kind)
    total = torch.randint(4, 80, (num_plates,), generator=by).to(kind)
    logits = -0.5 + 0.1 * kind + 1.3 * extract - 0.8 * kind * extract
    logits = logits + 0.3 * torch.randn(num_plates, generator=by)
    return seeds_model, (kind, extract, total, torch.binomial(total, logits.sigmoid(), by))


def poisson_process_model(x: Tensor, y: Tensor) -> None:
    """Counts whose log rate is a Gaussian process with a length and a height."""
    length = pyro.sample("length", dist.Gamma(25.0, 4.0))
    height = pyro.sample("height", dist.HalfNormal(2.0))
    noise = pyro.sample("noise", dist.Normal(torch.zeros_like(x), 1.0).to_event(1))
    away = (x[:, None] - x) / length[..., None, None]
    covariance = height[..., None, None] ** 2 * torch.exp(-0.5 * away**2) + 1e-6 * torch.eye(len(x))
    log_rate = (torch.linalg.cholesky(covariance) @ noise[..., None]).squeeze(-1)
    pyro.sample("y", dist.Poisson(log_rate.exp()).to_event(1), obs=y)


def poisson_process(num_points: int = 11) -> Subject:
    x = torch.linspace(-10, 10, num_points)
    return poisson_process_model, (x, torch.poisson((1.5 + torch.sin(x / 2)).exp(), generator(3)))


def dugongs_model(age: Tensor, length: Tensor) -> None:
    """A length that grows towards a limit with age."""
    alpha = pyro.sample("alpha", dist.Normal(0.0, 30.0))
    beta = pyro.sample("beta", dist.Normal(0.0, 30.0))
    base = pyro.sample("base", dist.Uniform(0.5, 1.0))
    tau = pyro.sample("tau", dist.Gamma(0.01, 0.01))
    with pyro.plate("animals", len(age)):
        pyro.sample("length", dist.Normal(alpha - beta * base**age, tau.rsqrt()), obs=length)


def dugongs(num_animals: int = 27) -> Subject:
    age = torch.linspace(0.8, 5.6, num_animals).exp() / 9
    noise = 0.1 * torch.randn(num_animals, generator=generator(4))
    return dugongs_model, (age, 2.65 - 0.97 * 0.87**age + noise)


def rats_model(week: Tensor, weight: Tensor) -> None:
    """Weights of rats at some ages, with an intercept and a slope of each rat."""
    loc = pyro.sample("loc", dist.Normal(torch.tensor([240.0, 6.0]), 100.0).to_event(1))
    sd = pyro.sample("sd", dist.HalfNormal(torch.tensor([50.0, 5.0])).to_event(1))
    noise = pyro.sample("noise", dist.HalfNormal(20.0))
    with pyro.plate("rats", weight.shape[1], dim=-1):
        intercept = pyro.sample("intercept", dist.Normal(loc[..., 0], sd[..., 0]))
        slope = pyro.sample("slope", dist.Normal(loc[..., 1], sd[..., 1]))
        with pyro.plate("weeks", len(week), dim=-2):
            mean = intercept + slope * week[:, None]
            pyro.sample("weight", dist.Normal(mean, noise), obs=weight)


def rats(num_rats: int = 30) -> Subject:
    week, by = torch.tensor([-14.0, -7.0, 0.0, 7.0, 14.0]), generator(5)
    intercept, slope = torch.randn(2, num_rats, generator=by)
    mean = 242 + 14 * intercept + (6.2 + 0.5 * slope) * week[:, None]
    return rats_model, (week, mean + 6 * torch.randn(len(week), num_rats, generator=by))


def ordinal_model(person: Tensor, x: Tensor, num_persons: int, y: Tensor) -> None:
    """Ratings in five categories, with an effect of each person."""
    cuts = dist.Normal(torch.zeros(4), 3.0).to_event(1)
    cutpoints = pyro.sample("cutpoints", dist.TransformedDistribution(cuts, [OrderedTransform()]))
    slope = pyro.sample("slope", dist.Normal(0.0, 2.0))
    sd = pyro.sample("sd", dist.HalfNormal(1.0))
    with pyro.plate("persons", num_persons):
        effect = pyro.sample("effect", dist.Normal(0.0, sd))
    with pyro.plate("ratings", len(y)):
        predictor = slope * x + effect[..., person]
        pyro.sample("y", dist.OrderedLogistic(predictor, cutpoints), obs=y)


def ordinal(num_persons: int = 20, num_ratings: int = 120) -> Subject:
    by = generator(6)
    person, x = torch.arange(num_ratings) % num_persons, torch.randn(num_ratings, generator=by)
    effect = torch.randn(num_persons, generator=by)[person]
    noise = torch.rand(num_ratings, generator=by).logit()
    cuts = torch.tensor([-2.0, -0.5, 0.5, 2.0])
    y = (0.8 * x + effect + noise)[:, None].gt(cuts).sum(1)
    return ordinal_model, (person, x, num_persons, y)


def catches_model(x: Tensor, y: Tensor) -> None:
    """Counts of fish: zero-inflated, overdispersed, with two covariates."""
    beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 2.0).to_event(1))
    gate = pyro.sample("gate", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    dispersion = pyro.sample("dispersion", dist.Gamma(2.0, 1.0))
    log_mean = beta[..., 0] + beta[..., 1] * x[0] + beta[..., 2] * x[1]
    gate_logits = gate[..., 0] + gate[..., 1] * x[0]
    with pyro.plate("visits", len(y)):
        counts = dist.NegativeBinomial(dispersion, logits=log_mean - dispersion.log())
        pyro.sample("y", dist.ZeroInflatedDistribution(counts, gate_logits=gate_logits), obs=y)


def catches(num_visits: int = 150) -> Subject:
    by = generator(7)
    x = torch.randn(2, num_visits, generator=by)
    is_there = torch.rand(num_visits, generator=by) < torch.sigmoid(0.3 + 0.8 * x[0])
    spread = torch.randn(num_visits, generator=by).exp()
    y = torch.poisson((0.8 - 0.4 * x[0] + 0.5 * x[1]).exp() * spread, by)
    return catches_model, (x, y * is_there)


def survival_model(x: Tensor, time: Tensor, is_event: Tensor) -> None:
    """Weibull times until an event, many of them censored."""
    beta = pyro.sample("beta", dist.Normal(torch.zeros(4), 2.0).to_event(1))
    shape = pyro.sample("shape", dist.Gamma(1.0, 0.5))
    log_scale = beta[..., 0] + beta[..., 1] * x[0] + beta[..., 2] * x[1] + beta[..., 3] * x[2]
    away = time.log() - log_scale
    with pyro.plate("patients", len(time)):
        log_hazard = shape.log() - log_scale + (shape - 1) * away
        pyro.factor("time", is_event * log_hazard - (shape * away).exp())


def survival(num_patients: int = 40) -> Subject:
    by = generator(8)
    x = torch.randn(3, num_patients, generator=by)
    until = -torch.rand(num_patients, generator=by).log()
    time = (1 + 0.5 * x[0] - 0.3 * x[1]).exp() * until ** (1 / 1.4)
    censored = 4 * torch.rand(num_patients, generator=by)
    return survival_model, (x, torch.minimum(time, censored), (time < censored).to(time))


def growth_model(time: Tensor, y: Tensor) -> None:
    """Logistic growth seen before it has saturated, with multiplicative noise."""
    capacity = pyro.sample("capacity", dist.LogNormal(3.0, 1.5))
    rate = pyro.sample("rate", dist.HalfNormal(1.0))
    middle = pyro.sample("middle", dist.Normal(5.0, 10.0))
    noise = pyro.sample("noise", dist.HalfNormal(0.5))
    with pyro.plate("days", len(time)):
        mean = capacity.log() + torch.nn.functional.logsigmoid(rate * (time - middle))
        pyro.sample("y", dist.LogNormal(mean, noise), obs=y)


def growth(num_days: int = 9) -> Subject:
    time, noise = torch.linspace(0, 8, num_days), torch.randn(num_days, generator=generator(9))
    return growth_model, (time, 30 * torch.sigmoid(0.7 * (time - 7)) * (0.15 * noise).exp())


def concentration_model(time: Tensor, dose: float, y: Tensor) -> None:
    """A drug that is absorbed and cleared, at rates of each subject."""
    loc = pyro.sample("loc", dist.Normal(torch.tensor([0.5, -3.0, -0.7]), 1.0).to_event(1))
    sd = pyro.sample("sd", dist.HalfNormal(torch.ones(3)).to_event(1))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    with pyro.plate("subjects", y.shape[1], dim=-1):
        absorption = pyro.sample("absorption", dist.Normal(loc[..., 0], sd[..., 0])).exp()
        clearance = pyro.sample("clearance", dist.Normal(loc[..., 1], sd[..., 1])).exp()
        volume = pyro.sample("volume", dist.Normal(loc[..., 2], sd[..., 2])).exp()
        with pyro.plate("times", len(time), dim=-2):
            mean = concentration(time[:, None], dose, absorption, clearance, volume)
            pyro.sample("y", dist.Normal(mean, noise), obs=y)


def concentration(
    time: Tensor, dose: float, absorption: Tensor, clearance: Tensor, volume: Tensor
) -> Tensor:
    """One compartment, by mouth: the difference of two exponentials."""
    elimination = clearance / volume
    away = (-elimination * time).exp() - (-absorption * time).exp()
    return dose * absorption / (volume * (absorption - elimination)) * away


def drug(num_subjects: int = 8, dose: float = 4.0) -> Subject:
    time, by = torch.tensor([0.25, 0.5, 1.0, 2.0, 4.0, 6.0, 9.0, 12.0, 24.0]), generator(10)
    noise = torch.randn(3, num_subjects, generator=by)
    absorption, clearance = (0.4 + 0.6 * noise[0]).exp(), (-3.2 + 0.25 * noise[1]).exp()
    volume = (-0.75 + 0.15 * noise[2]).exp()
    mean = concentration(time[:, None], dose, absorption, clearance, volume)
    return concentration_model, (time, dose, mean + 0.6 * torch.randn(mean.shape, generator=by))


MODELS: dict[str, Callable[[], Subject]] = {
    made.__name__: made
    for made in (
        *(dogs, seeds, poisson_process, dugongs, rats),
        *(ordinal, catches, survival, growth, drug),
    )
}
