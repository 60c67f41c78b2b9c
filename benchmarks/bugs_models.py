# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Examples of volume 1 of the BUGS manual, in their own vague priors, as one would write them in Pyro.

Bayesian inference Using Gibbs Sampling, examples volume 1 (Spiegelhalter, Thomas, Best, Gilks, 1996). Where
the manual of OpenBUGS has narrower priors, these are those of the first one. `dnorm(m, p)` has the sd
`p**-0.5`. Data are in bugs_data.json, numbers of the manual.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro import distributions as dist
from torch import Tensor

Subject = tuple[Callable[..., Any], tuple[Any, ...]]

DATA = json.loads((Path(__file__).parent / "bugs_data.json").read_text())


def numbers(name: str, *keys: str) -> tuple[Tensor, ...]:
    """Data of an example in the default dtype."""
    return tuple(torch.tensor(DATA[name][key], dtype=torch.get_default_dtype()) for key in keys)


def indices(name: str, *keys: str) -> tuple[Tensor, ...]:
    """Numbers of groups, from 0."""
    return tuple(torch.tensor(DATA[name][key]) - 1 for key in keys)


def rats_model(x: Tensor, y: Tensor) -> None:
    """Weights of 30 rats at five ages: an intercept and a slope of each rat."""
    alpha_c = pyro.sample("alpha_c", dist.Normal(0.0, 1e3))
    beta_c = pyro.sample("beta_c", dist.Normal(0.0, 1e3))
    alpha_tau = pyro.sample("alpha_tau", dist.Gamma(1e-3, 1e-3))
    beta_tau = pyro.sample("beta_tau", dist.Gamma(1e-3, 1e-3))
    tau_c = pyro.sample("tau_c", dist.Gamma(1e-3, 1e-3))
    with pyro.plate("rats", y.shape[1], dim=-1):
        alpha = pyro.sample("alpha", dist.Normal(alpha_c, alpha_tau.rsqrt()))
        beta = pyro.sample("beta", dist.Normal(beta_c, beta_tau.rsqrt()))
        with pyro.plate("ages", len(x), dim=-2):
            mean = alpha + beta * (x - x.mean())[:, None]
            pyro.sample("y", dist.Normal(mean, tau_c.rsqrt()), obs=y)


def rats() -> Subject:
    x, y = numbers("rats", "x", "y")
    return rats_model, (x, y.T)


def pump_model(t: Tensor, x: Tensor) -> None:
    """Failures of ten pumps, each at a rate of its own."""
    alpha = pyro.sample("alpha", dist.Exponential(1.0))
    beta = pyro.sample("beta", dist.Gamma(0.1, 1.0))
    with pyro.plate("pumps", len(x)):
        theta = pyro.sample("theta", dist.Gamma(alpha, beta))
        pyro.sample("x", dist.Poisson(theta * t), obs=x)


def pump() -> Subject:
    return pump_model, numbers("pump", "t", "x")


def dogs_model(avoided: Tensor, shocked: Tensor, y: Tensor) -> None:
    """Learning to avoid a shock: a log-linear probability of the next one.

    Slopes are normal below 0 (the manual has -0.00001).
    """
    alpha = -pyro.sample("minus_alpha", dist.HalfNormal(1e-5**-0.5))
    beta = -pyro.sample("minus_beta", dist.HalfNormal(1e-5**-0.5))
    with pyro.plate("trials", len(y)):
        pyro.sample("y", dist.Bernoulli((alpha * avoided + beta * shocked).exp()), obs=y)


def dogs() -> Subject:
    (is_avoided,) = numbers("dogs", "Y")
    before = is_avoided.cumsum(1)[:, :-1]
    shocked = torch.arange(1, is_avoided.shape[1]) - before
    return dogs_model, (before.flatten(), shocked.flatten(), 1 - is_avoided[:, 1:].flatten())


def seeds_model(x1: Tensor, x2: Tensor, n: Tensor, r: Tensor) -> None:
    """Seeds that germinate on 21 plates, by kind and extract, with an effect of each plate."""
    alpha0 = pyro.sample("alpha0", dist.Normal(0.0, 1e3))
    alpha1 = pyro.sample("alpha1", dist.Normal(0.0, 1e3))
    alpha2 = pyro.sample("alpha2", dist.Normal(0.0, 1e3))
    alpha12 = pyro.sample("alpha12", dist.Normal(0.0, 1e3))
    tau = pyro.sample("tau", dist.Gamma(1e-3, 1e-3))
    with pyro.plate("plates", len(r)):
        b = pyro.sample("b", dist.Normal(0.0, tau.rsqrt()))
        logits = alpha0 + alpha1 * x1 + alpha2 * x2 + alpha12 * x1 * x2 + b
        pyro.sample("r", dist.Binomial(n, logits=logits), obs=r)


def seeds() -> Subject:
    return seeds_model, numbers("seeds", "x1", "x2", "n", "r")


def surgical_model(n: Tensor, r: Tensor) -> None:
    """Deaths in twelve hospitals."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1e3))
    tau = pyro.sample("tau", dist.Gamma(1e-3, 1e-3))
    with pyro.plate("hospitals", len(r)):
        b = pyro.sample("b", dist.Normal(mu, tau.rsqrt()))
        pyro.sample("r", dist.Binomial(n, logits=b), obs=r)


def surgical() -> Subject:
    return surgical_model, numbers("surgical", "n", "r")


def magnesium_model(nt: Tensor, rt: Tensor, nc: Tensor, rc: Tensor) -> None:
    """A meta-analysis of eight trials: prior 1 of six, gamma on the precision."""
    mu = pyro.sample("mu", dist.Uniform(-10.0, 10.0))
    tau = pyro.sample("tau", dist.Gamma(1e-3, 1e-3))
    with pyro.plate("trials", len(nt)):
        theta = pyro.sample("theta", dist.Normal(mu, tau.rsqrt()))
        pc = pyro.sample("pc", dist.Uniform(0.0, 1.0))
        pyro.sample("rc", dist.Binomial(nc, pc), obs=rc)
        pyro.sample("rt", dist.Binomial(nt, logits=theta + pc.logit()), obs=rt)


def magnesium() -> Subject:
    return magnesium_model, numbers("magnesium", "nt", "rt", "nc", "rc")


def salm_model(x: Tensor, y: Tensor) -> None:
    """Colonies of salmonella at six doses up to 1,000, three plates of each, overdispersed."""
    alpha = pyro.sample("alpha", dist.Normal(0.0, 1e3))
    beta = pyro.sample("beta", dist.Normal(0.0, 1e3))
    gamma = pyro.sample("gamma", dist.Normal(0.0, 1e3))
    tau = pyro.sample("tau", dist.Gamma(1e-3, 1e-3))
    dose = x[:, None]
    with pyro.plate("doses", y.shape[0], dim=-2), pyro.plate("plates", y.shape[1], dim=-1):
        effect = pyro.sample("lambda", dist.Normal(0.0, tau.rsqrt()))
        log_rate = alpha + beta * (dose + 10).log() + gamma * dose + effect
        pyro.sample("y", dist.Poisson(log_rate.exp()), obs=y)


def salm() -> Subject:
    return salm_model, numbers("salm", "x", "y")


def equiv_model(treatment: Tensor, period: Tensor, y: Tensor) -> None:
    """A cross-over trial of two tablets on ten subjects; treatments and periods are -1 and 1."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1e3))
    phi = pyro.sample("phi", dist.Normal(0.0, 1e3))
    pi = pyro.sample("pi", dist.Normal(0.0, 1e3))
    tau1 = pyro.sample("tau1", dist.Gamma(1e-3, 1e-3))
    tau2 = pyro.sample("tau2", dist.Gamma(1e-3, 1e-3))
    with pyro.plate("subjects", y.shape[0], dim=-2):
        delta = pyro.sample("delta", dist.Normal(0.0, tau2.rsqrt()))
        with pyro.plate("periods", y.shape[1], dim=-1):
            mean = mu + treatment * phi / 2 + period * pi / 2 + delta
            pyro.sample("y", dist.Normal(mean, tau1.rsqrt()), obs=y)


def equiv() -> Subject:
    group, y = numbers("equiv", "group", "Y")
    period = torch.tensor([1.0, -1.0])
    return equiv_model, (group[:, None] * period, period, y)


def dyes_model(y: Tensor) -> None:
    """Yields of five samples from each of six batches."""
    theta = pyro.sample("theta", dist.Normal(0.0, 1e5))
    tau_btw = pyro.sample("tau_btw", dist.Gamma(1e-3, 1e-3))
    tau_with = pyro.sample("tau_with", dist.Gamma(1e-3, 1e-3))
    with pyro.plate("batches", y.shape[0], dim=-2):
        mu = pyro.sample("mu", dist.Normal(theta, tau_btw.rsqrt()))
        with pyro.plate("samples", y.shape[1], dim=-1):
            pyro.sample("y", dist.Normal(mu, tau_with.rsqrt()), obs=y)


def dyes() -> Subject:
    return dyes_model, numbers("dyes", "y")


def stacks_model(z: Tensor, y: Tensor) -> None:
    """Stack loss: a ridge regression with t errors of 4 degrees of freedom."""
    beta0 = pyro.sample("beta0", dist.Normal(0.0, 1e-5**-0.5))
    phi = pyro.sample("phi", dist.Gamma(1e-2, 1e-2))
    tau = pyro.sample("tau", dist.Gamma(1e-3, 1e-3))
    with pyro.plate("columns", z.shape[1]):
        beta = pyro.sample("beta", dist.Normal(0.0, phi.rsqrt()))
    mean = beta0 + (beta[..., None, :] * z).sum(-1)
    with pyro.plate("days", len(y)):
        pyro.sample("y", dist.StudentT(4.0, mean, tau.rsqrt()), obs=y)


def stacks() -> Subject:
    x, y = numbers("stacks", "x", "Y")
    return stacks_model, ((x - x.mean(0)) / x.std(0), y)


def epil_model(base: Tensor, treatment: Tensor, age: Tensor, fourth: Tensor, y: Tensor) -> None:
    """Seizures of 59 patients at four visits, with effects of patients and of visits of patients."""
    a0 = pyro.sample("a0", dist.Normal(0.0, 1e2))
    alpha_base = pyro.sample("alpha_base", dist.Normal(0.0, 1e2))
    alpha_treatment = pyro.sample("alpha_treatment", dist.Normal(0.0, 1e2))
    alpha_both = pyro.sample("alpha_both", dist.Normal(0.0, 1e2))
    alpha_age = pyro.sample("alpha_age", dist.Normal(0.0, 1e2))
    alpha_fourth = pyro.sample("alpha_fourth", dist.Normal(0.0, 1e2))
    tau_b1 = pyro.sample("tau_b1", dist.Gamma(1e-3, 1e-3))
    tau_b = pyro.sample("tau_b", dist.Gamma(1e-3, 1e-3))
    log_rate = a0 + alpha_base * centred(base) + alpha_treatment * centred(treatment)
    log_rate = log_rate + alpha_both * centred(base * treatment) + alpha_age * centred(age)
    with pyro.plate("patients", y.shape[0], dim=-2):
        b1 = pyro.sample("b1", dist.Normal(0.0, tau_b1.rsqrt()))
        with pyro.plate("visits", y.shape[1], dim=-1):
            b = pyro.sample("b", dist.Normal(0.0, tau_b.rsqrt()))
            log_rate = log_rate + alpha_fourth * centred(fourth) + b1 + b
            pyro.sample("y", dist.Poisson(log_rate.exp()), obs=y)


def centred(column: Tensor) -> Tensor:
    return column - column.mean()


def epil() -> Subject:
    base, treatment, age, fourth, y = numbers("epil", "base", "treatment", "age", "fourth", "y")
    columns = (base / 4).log(), treatment, age.log()
    return epil_model, (*(column[:, None] for column in columns), fourth, y)


def blocker_model(nt: Tensor, rt: Tensor, nc: Tensor, rc: Tensor) -> None:
    """A meta-analysis of 22 trials of beta-blockers, with the effect in a new trial."""
    d = pyro.sample("d", dist.Normal(0.0, 1e3))
    tau = pyro.sample("tau", dist.Gamma(1e-3, 1e-3))
    pyro.sample("delta_new", dist.Normal(d, tau.rsqrt()))
    with pyro.plate("trials", len(nt)):
        mu = pyro.sample("mu", dist.Normal(0.0, 1e-5**-0.5))
        delta = pyro.sample("delta", dist.Normal(d, tau.rsqrt()))
        pyro.sample("rc", dist.Binomial(nc, logits=mu), obs=rc)
        pyro.sample("rt", dist.Binomial(nt, logits=mu + delta), obs=rt)


def blocker() -> Subject:
    return blocker_model, numbers("blocker", "nt", "rt", "nc", "rc")


def oxford_model(year: Tensor, n0: Tensor, r0: Tensor, n1: Tensor, r1: Tensor) -> None:
    """X-rays before births: 120 tables of two by two, whose log odds ratio is quadratic in the year."""
    alpha = pyro.sample("alpha", dist.Normal(0.0, 1e3))
    beta1 = pyro.sample("beta1", dist.Normal(0.0, 1e3))
    beta2 = pyro.sample("beta2", dist.Normal(0.0, 1e3))
    tau = pyro.sample("tau", dist.Gamma(1e-3, 1e-3))
    with pyro.plate("tables", len(year)):
        mu = pyro.sample("mu", dist.Normal(0.0, 1e3))
        b = pyro.sample("b", dist.Normal(0.0, tau.rsqrt()))
        log_ratio = alpha + beta1 * year + beta2 * (year**2 - 22) + b
        pyro.sample("r0", dist.Binomial(n0, logits=mu), obs=r0)
        pyro.sample("r1", dist.Binomial(n1, logits=mu + log_ratio), obs=r1)


def oxford() -> Subject:
    return oxford_model, numbers("oxford", "year", "n0", "r0", "n1", "r1")


def lsat_model(r: Tensor) -> None:
    """Five questions to 1,000 students: a Rasch model."""
    beta = pyro.sample("beta", dist.HalfNormal(1e2))
    with pyro.plate("questions", r.shape[0], dim=-2):
        alpha = pyro.sample("alpha", dist.Normal(0.0, 1e2))
    with pyro.plate("students", r.shape[1], dim=-1):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        with pyro.plate("answers", r.shape[0], dim=-2):
            pyro.sample("r", dist.Bernoulli(logits=beta * theta - alpha), obs=r)


def lsat() -> Subject:
    response, up_to = numbers("lsat", "response", "culm")
    counts = up_to.diff(prepend=torch.zeros(1)).long()
    return lsat_model, (response.repeat_interleave(counts, 0).T,)


def mice_model(group: Tensor, time: Tensor, group_censored: Tensor, censored: Tensor) -> None:
    """Weibull survival of mice in four groups; deaths, and times at which mice were alive."""
    r = pyro.sample("r", dist.Exponential(1e-3))
    with pyro.plate("groups", 4):
        beta = pyro.sample("beta", dist.Normal(0.0, 1e-3**-0.5))
    scale = (-beta / r).exp()
    with pyro.plate("deaths", len(time)):
        pyro.sample("time", dist.Weibull(scale[..., group], r), obs=time)
    with pyro.plate("alive", len(censored)):
        pyro.factor("censored", -((censored / scale[..., group_censored]) ** r))


def mice() -> Subject:
    time, censored = numbers("mice", "died", "censored")
    group, group_censored = indices("mice", "group_died", "group_censored")
    return mice_model, (group, time, group_censored, censored)


def kidney_model(
    time: Tensor, x: Tensor, patient: Tensor, censored: Tensor, x_censored: Tensor, of: Tensor
) -> None:
    """Weibull times until kidney infections of 38 patients; columns are age, sex, three diseases."""
    alpha = pyro.sample("alpha", dist.Normal(0.0, 1e2))
    beta_age = pyro.sample("beta_age", dist.Normal(0.0, 1e2))
    beta_sex = pyro.sample("beta_sex", dist.Normal(0.0, 1e2))
    beta_disease = pyro.sample("beta_disease", dist.Normal(torch.zeros(3), 1e2).to_event(1))
    tau = pyro.sample("tau", dist.Gamma(1e-3, 1e-3))
    r = pyro.sample("r", dist.Gamma(1.0, 1e-3))
    with pyro.plate("patients", 38):
        b = pyro.sample("b", dist.Normal(0.0, tau.rsqrt()))

    def scale(x: Tensor, patient: Tensor) -> Tensor:
        effect = alpha + beta_age * x[0] + beta_sex * x[1] + b[..., patient]
        for column, disease in enumerate(x[2:]):
            effect = effect + beta_disease[..., column] * disease
        return (-effect / r).exp()

    with pyro.plate("infections", len(time)):
        pyro.sample("time", dist.Weibull(scale(x, patient), r), obs=time)
    with pyro.plate("removals", len(censored)):
        pyro.factor("censored", -((censored / scale(x_censored, of)) ** r))


def kidney() -> Subject:
    arguments: list[Tensor] = []
    for kind in ("seen", "censored"):
        time, age, sex = numbers("kidney", f"t_{kind}", f"age_{kind}", f"sex_{kind}")
        disease, patient = indices("kidney", f"disease_{kind}", f"patient_{kind}")
        diseases = torch.stack([(disease == other).to(time) for other in (1, 2, 3)])
        arguments += [time, torch.stack([age, sex, *diseases]), patient]
    return kidney_model, tuple(arguments)


def leuk_model(length: Tensor, z: Tensor, is_at_risk: Tensor, died: Tensor) -> None:
    """Cox regression as counts of deaths in 17 intervals."""
    beta = pyro.sample("beta", dist.Normal(0.0, 1e3))
    with pyro.plate("intervals", len(length), dim=-2):
        hazard = pyro.sample("dL0", dist.Gamma(0.1 * length[:, None] * 1e-3, 1e-3))
        with pyro.plate("patients", len(z), dim=-1):
            rate = (beta * z).exp() * hazard
            pyro.sample("died", dist.Poisson(rate).mask(is_at_risk), obs=died)


def leuk() -> Subject:
    until, time, fail, z = numbers("leuk", "t", "obs_t", "fail", "Z")
    begin, end = until[:-1, None], until[1:, None]
    is_at_risk = time >= begin
    return leuk_model, (until.diff(), z, is_at_risk, fail * (is_at_risk & (time < end)))


def leukfr_model(length: Tensor, z: Tensor, pair: Tensor, is_at_risk: Tensor, died: Tensor) -> None:
    """The same with an effect of each of 21 pairs of patients."""
    beta = pyro.sample("beta", dist.Normal(0.0, 1e3))
    tau = pyro.sample("tau", dist.Gamma(1e-3, 1e-3))
    with pyro.plate("pairs", 21, dim=-1):
        b = pyro.sample("b", dist.Normal(0.0, tau.rsqrt()))
    with pyro.plate("intervals", len(length), dim=-2):
        hazard = pyro.sample("dL0", dist.Gamma(0.1 * length[:, None] * 1e-3, 1e-3))
        with pyro.plate("patients", len(z), dim=-1):
            rate = (beta * z + b[..., pair]).exp() * hazard
            pyro.sample("died", dist.Poisson(rate).mask(is_at_risk), obs=died)


def leukfr() -> Subject:
    length, z, is_at_risk, died = leuk()[1]
    return leukfr_model, (length, z, *indices("leukfr", "pair"), is_at_risk, died)


MODELS: dict[str, Callable[[], Subject]] = {
    made.__name__: made
    for made in (
        *(rats, pump, dogs, seeds, surgical, magnesium, salm, equiv, dyes, stacks),
        *(epil, blocker, oxford, lsat, mice, kidney, leuk, leukfr),
    )
}
