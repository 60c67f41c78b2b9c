# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Examples of volume 1 of the BUGS manual, in their own vague priors, for Pyro and NumPyro.

Bayesian inference Using Gibbs Sampling, examples volume 1 (Spiegelhalter, Thomas, Best, Gilks, 1996). Where
the manual of OpenBUGS has narrower priors, these are those of the first one. `dnorm(m, p)` has the sd
`p**-0.5`. Data are in bugs.json, numbers of the manual.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.library import PYRO, Library, Subject

DATA = json.loads((Path(__file__).parent / "bugs.json").read_text())


def numbers(name: str, *keys: str) -> tuple[Tensor, ...]:
    """Data of an example in the default dtype."""
    return tuple(torch.tensor(DATA[name][key], dtype=torch.get_default_dtype()) for key in keys)


def indices(name: str, *keys: str) -> tuple[Tensor, ...]:
    """Numbers of groups, from 0."""
    return tuple(torch.tensor(DATA[name][key]) - 1 for key in keys)


def normal(lib: Library, name: str, sd: float) -> Any:
    return lib.sample(name, lib.dist.Normal(0.0, sd))


def precision(lib: Library, name: str, vague: float = 1e-3) -> Any:
    return lib.sample(name, lib.dist.Gamma(vague, vague))


def effect(lib: Library, name: str, precision: Any, mean: Any = 0.0) -> Any:
    return lib.sample(name, lib.dist.Normal(mean, precision**-0.5))


def rats_model(lib: Library, x: Tensor, y: Tensor) -> None:
    """Weights of 30 rats at five ages: an intercept and a slope of each rat."""
    alpha_c = normal(lib, "alpha_c", 1e3)
    beta_c = normal(lib, "beta_c", 1e3)
    alpha_tau = precision(lib, "alpha_tau")
    beta_tau = precision(lib, "beta_tau")
    tau_c = precision(lib, "tau_c")
    with lib.plate("rats", y.shape[1], dim=-1):
        alpha = effect(lib, "alpha", alpha_tau, alpha_c)
        beta = effect(lib, "beta", beta_tau, beta_c)
        with lib.plate("ages", len(x), dim=-2):
            mean = alpha + beta * (x - x.mean())[:, None]
            lib.sample("y", lib.dist.Normal(mean, tau_c**-0.5), obs=y)


def rats() -> Subject:
    x, y = numbers("rats", "x", "y")
    return rats_model, (x, y.T)


def pump_model(lib: Library, t: Tensor, x: Tensor) -> None:
    """Failures of ten pumps, each at a rate of its own."""
    alpha = lib.sample("alpha", lib.dist.Exponential(1.0))
    beta = lib.sample("beta", lib.dist.Gamma(0.1, 1.0))
    with lib.plate("pumps", len(x)):
        theta = lib.sample("theta", lib.dist.Gamma(alpha, beta))
        lib.sample("x", lib.dist.Poisson(theta * t), obs=x)


def pump() -> Subject:
    return pump_model, numbers("pump", "t", "x")


def dogs_model(lib: Library, avoided: Tensor, shocked: Tensor, y: Tensor) -> None:
    """Learning to avoid a shock: a log-linear probability of the next one.

    Slopes are normal below 0 (the manual has -0.00001).
    """
    alpha = -lib.sample("minus_alpha", lib.dist.HalfNormal(1e-5**-0.5))
    beta = -lib.sample("minus_beta", lib.dist.HalfNormal(1e-5**-0.5))
    with lib.plate("trials", len(y)):
        lib.sample("y", lib.dist.Bernoulli(lib.arrays.exp(alpha * avoided + beta * shocked)), obs=y)


def dogs() -> Subject:
    (is_avoided,) = numbers("dogs", "Y")
    before = is_avoided.cumsum(1)[:, :-1]
    shocked = torch.arange(1, is_avoided.shape[1]) - before
    return dogs_model, (before.flatten(), shocked.flatten(), 1 - is_avoided[:, 1:].flatten())


def seeds_model(lib: Library, x1: Tensor, x2: Tensor, n: Tensor, r: Tensor) -> None:
    """Seeds that germinate on 21 plates, by kind and extract, with an effect of each plate."""
    names = "alpha0", "alpha1", "alpha2", "alpha12"
    alpha0, alpha1, alpha2, alpha12 = (normal(lib, name, 1e3) for name in names)
    tau = precision(lib, "tau")
    with lib.plate("plates", len(r)):
        b = effect(lib, "b", tau)
        logits = alpha0 + alpha1 * x1 + alpha2 * x2 + alpha12 * x1 * x2 + b
        lib.sample("r", lib.dist.Binomial(n, logits=logits), obs=r)


def seeds() -> Subject:
    return seeds_model, numbers("seeds", "x1", "x2", "n", "r")


def surgical_model(lib: Library, n: Tensor, r: Tensor) -> None:
    """Deaths in twelve hospitals."""
    mu = normal(lib, "mu", 1e3)
    tau = precision(lib, "tau")
    with lib.plate("hospitals", len(r)):
        b = effect(lib, "b", tau, mu)
        lib.sample("r", lib.dist.Binomial(n, logits=b), obs=r)


def surgical() -> Subject:
    return surgical_model, numbers("surgical", "n", "r")


def magnesium_model(lib: Library, nt: Tensor, rt: Tensor, nc: Tensor, rc: Tensor) -> None:
    """A meta-analysis of eight trials: prior 1 of six, gamma on the precision."""
    mu = lib.sample("mu", lib.dist.Uniform(-10.0, 10.0))
    tau = precision(lib, "tau")
    with lib.plate("trials", len(nt)):
        theta = effect(lib, "theta", tau, mu)
        pc = lib.sample("pc", lib.dist.Uniform(0.0, 1.0))
        lib.sample("rc", lib.dist.Binomial(nc, pc), obs=rc)
        lib.sample(
            "rt", lib.dist.Binomial(nt, logits=theta + lib.arrays.log(pc / (1 - pc))), obs=rt
        )


def magnesium() -> Subject:
    return magnesium_model, numbers("magnesium", "nt", "rt", "nc", "rc")


def salm_model(lib: Library, x: Tensor, y: Tensor) -> None:
    """Colonies of salmonella at six doses up to 1,000, three plates of each, overdispersed."""
    alpha, beta, gamma = (normal(lib, name, 1e3) for name in ("alpha", "beta", "gamma"))
    tau = precision(lib, "tau")
    dose = x[:, None]
    with lib.plate("doses", y.shape[0], dim=-2), lib.plate("plates", y.shape[1], dim=-1):
        excess = effect(lib, "lambda", tau)
        log_rate = alpha + beta * lib.arrays.log(dose + 10) + gamma * dose + excess
        lib.sample("y", lib.dist.Poisson(lib.arrays.exp(log_rate)), obs=y)


def salm() -> Subject:
    return salm_model, numbers("salm", "x", "y")


def equiv_model(lib: Library, treatment: Tensor, period: Tensor, y: Tensor) -> None:
    """A cross-over trial of two tablets on ten subjects; treatments and periods are -1 and 1."""
    mu, phi, pi = (normal(lib, name, 1e3) for name in ("mu", "phi", "pi"))
    tau1 = precision(lib, "tau1")
    tau2 = precision(lib, "tau2")
    with lib.plate("subjects", y.shape[0], dim=-2):
        delta = effect(lib, "delta", tau2)
        with lib.plate("periods", y.shape[1], dim=-1):
            mean = mu + treatment * phi / 2 + period * pi / 2 + delta
            lib.sample("y", lib.dist.Normal(mean, tau1**-0.5), obs=y)


def equiv() -> Subject:
    group, y = numbers("equiv", "group", "Y")
    period = torch.tensor([1.0, -1.0])
    return equiv_model, (group[:, None] * period, period, y)


def dyes_model(lib: Library, y: Tensor) -> None:
    """Yields of five samples from each of six batches."""
    theta = normal(lib, "theta", 1e5)
    tau_btw = precision(lib, "tau_btw")
    tau_with = precision(lib, "tau_with")
    with lib.plate("batches", y.shape[0], dim=-2):
        mu = effect(lib, "mu", tau_btw, theta)
        with lib.plate("samples", y.shape[1], dim=-1):
            lib.sample("y", lib.dist.Normal(mu, tau_with**-0.5), obs=y)


def dyes() -> Subject:
    return dyes_model, numbers("dyes", "y")


def stacks_model(lib: Library, z: Tensor, y: Tensor) -> None:
    """Stack loss: a ridge regression with t errors of 4 degrees of freedom."""
    beta0 = normal(lib, "beta0", 1e-5**-0.5)
    phi = precision(lib, "phi", 1e-2)
    tau = precision(lib, "tau")
    with lib.plate("columns", z.shape[1]):
        beta = effect(lib, "beta", phi)
    mean = beta0 + (beta[..., None, :] * z).sum(-1)
    with lib.plate("days", len(y)):
        lib.sample("y", lib.dist.StudentT(4.0, mean, tau**-0.5), obs=y)


def stacks() -> Subject:
    x, y = numbers("stacks", "x", "Y")
    return stacks_model, ((x - x.mean(0)) / x.std(0), y)


def epil_model(
    lib: Library, base: Tensor, treatment: Tensor, age: Tensor, fourth: Tensor, y: Tensor
) -> None:
    """Seizures of 59 patients at four visits, with effects of patients and of visits of patients."""
    columns = {"base": base, "treatment": treatment, "both": base * treatment, "age": age}
    log_rate = normal(lib, "a0", 1e2)
    for name, column in {**columns, "fourth": fourth}.items():
        log_rate = log_rate + normal(lib, f"alpha_{name}", 1e2) * (column - column.mean())
    tau_b1 = precision(lib, "tau_b1")
    tau_b = precision(lib, "tau_b")
    with lib.plate("patients", y.shape[0], dim=-2):
        b1 = effect(lib, "b1", tau_b1)
        with lib.plate("visits", y.shape[1], dim=-1):
            b = effect(lib, "b", tau_b)
            lib.sample("y", lib.dist.Poisson(lib.arrays.exp(log_rate + b1 + b)), obs=y)


def epil() -> Subject:
    base, treatment, age, fourth, y = numbers("epil", "base", "treatment", "age", "fourth", "y")
    columns = (base / 4).log(), treatment, age.log()
    return epil_model, (*(column[:, None] for column in columns), fourth, y)


def blocker_model(lib: Library, nt: Tensor, rt: Tensor, nc: Tensor, rc: Tensor) -> None:
    """A meta-analysis of 22 trials of beta-blockers, with the effect in a new trial."""
    d = normal(lib, "d", 1e3)
    tau = precision(lib, "tau")
    effect(lib, "delta_new", tau, d)
    with lib.plate("trials", len(nt)):
        mu = normal(lib, "mu", 1e-5**-0.5)
        delta = effect(lib, "delta", tau, d)
        lib.sample("rc", lib.dist.Binomial(nc, logits=mu), obs=rc)
        lib.sample("rt", lib.dist.Binomial(nt, logits=mu + delta), obs=rt)


def blocker() -> Subject:
    return blocker_model, numbers("blocker", "nt", "rt", "nc", "rc")


def oxford_model(
    lib: Library, year: Tensor, n0: Tensor, r0: Tensor, n1: Tensor, r1: Tensor
) -> None:
    """X-rays before births: 120 tables of two by two, whose log odds ratio is quadratic in the year."""
    alpha, beta1, beta2 = (normal(lib, name, 1e3) for name in ("alpha", "beta1", "beta2"))
    tau = precision(lib, "tau")
    with lib.plate("tables", len(year)):
        mu = normal(lib, "mu", 1e3)
        b = effect(lib, "b", tau)
        log_ratio = alpha + beta1 * year + beta2 * (year**2 - 22) + b
        lib.sample("r0", lib.dist.Binomial(n0, logits=mu), obs=r0)
        lib.sample("r1", lib.dist.Binomial(n1, logits=mu + log_ratio), obs=r1)


def oxford() -> Subject:
    return oxford_model, numbers("oxford", "year", "n0", "r0", "n1", "r1")


def lsat_model(lib: Library, r: Tensor) -> None:
    """Five questions to 1,000 students: a Rasch model."""
    beta = lib.sample("beta", lib.dist.HalfNormal(1e2))
    with lib.plate("questions", r.shape[0], dim=-2):
        alpha = normal(lib, "alpha", 1e2)
    with lib.plate("students", r.shape[1], dim=-1):
        theta = normal(lib, "theta", 1.0)
        with lib.plate("answers", r.shape[0], dim=-2):
            lib.sample("r", lib.dist.Bernoulli(logits=beta * theta - alpha), obs=r)


def lsat() -> Subject:
    response, up_to = numbers("lsat", "response", "culm")
    counts = up_to.diff(prepend=torch.zeros(1)).long()
    return lsat_model, (response.repeat_interleave(counts, 0).T,)


def mice_model(
    lib: Library, group: Tensor, time: Tensor, group_censored: Tensor, censored: Tensor
) -> None:
    """Weibull survival of mice in four groups; deaths, and times at which mice were alive."""
    r = lib.sample("r", lib.dist.Exponential(1e-3))
    with lib.plate("groups", 4):
        beta = normal(lib, "beta", 1e-3**-0.5)
    scale = lib.arrays.exp(-beta / r)
    with lib.plate("deaths", len(time)):
        lib.sample("time", lib.dist.Weibull(scale[..., group], r), obs=time)
    with lib.plate("alive", len(censored)):
        lib.factor("censored", -((censored / scale[..., group_censored]) ** r))


def mice() -> Subject:
    time, censored = numbers("mice", "died", "censored")
    group, group_censored = indices("mice", "group_died", "group_censored")
    return mice_model, (group, time, group_censored, censored)


def kidney_model(
    lib: Library,
    time: Tensor,
    x: Tensor,
    patient: Tensor,
    censored: Tensor,
    x_censored: Tensor,
    of: Tensor,
) -> None:
    """Weibull times until kidney infections of 38 patients; columns are age, sex, three diseases."""
    alpha = normal(lib, "alpha", 1e2)
    beta_age = normal(lib, "beta_age", 1e2)
    beta_sex = normal(lib, "beta_sex", 1e2)
    beta_disease = lib.sample("beta_disease", lib.dist.Normal(lib.arrays.zeros(3), 1e2).to_event(1))
    tau = precision(lib, "tau")
    r = lib.sample("r", lib.dist.Gamma(1.0, 1e-3))
    with lib.plate("patients", 38):
        b = effect(lib, "b", tau)

    def scale(x: Tensor, patient: Tensor) -> Tensor:
        linear = alpha + beta_age * x[0] + beta_sex * x[1] + b[..., patient]
        for column, disease in enumerate(x[2:]):
            linear = linear + beta_disease[..., column] * disease
        return lib.arrays.exp(-linear / r)

    with lib.plate("infections", len(time)):
        lib.sample("time", lib.dist.Weibull(scale(x, patient), r), obs=time)
    with lib.plate("removals", len(censored)):
        lib.factor("censored", -((censored / scale(x_censored, of)) ** r))


def kidney() -> Subject:
    arguments: list[Tensor] = []
    for kind in ("seen", "censored"):
        time, age, sex = numbers("kidney", f"t_{kind}", f"age_{kind}", f"sex_{kind}")
        disease, patient = indices("kidney", f"disease_{kind}", f"patient_{kind}")
        diseases = torch.stack([(disease == other).to(time) for other in (1, 2, 3)])
        arguments += [time, torch.stack([age, sex, *diseases]), patient]
    return kidney_model, tuple(arguments)


def leuk_model(lib: Library, length: Tensor, z: Tensor, is_at_risk: Tensor, died: Tensor) -> None:
    """Cox regression as counts of deaths in 17 intervals."""
    beta = normal(lib, "beta", 1e3)
    with lib.plate("intervals", len(length), dim=-2):
        hazard = lib.sample("dL0", lib.dist.Gamma(0.1 * length[:, None] * 1e-3, 1e-3))
        with lib.plate("patients", len(z), dim=-1):
            rate = lib.arrays.exp(beta * z) * hazard
            lib.sample("died", lib.dist.Poisson(rate).mask(is_at_risk), obs=died)


def leuk() -> Subject:
    until, time, fail, z = numbers("leuk", "t", "obs_t", "fail", "Z")
    begin, end = until[:-1, None], until[1:, None]
    is_at_risk = time >= begin
    return leuk_model, (until.diff(), z, is_at_risk, fail * (is_at_risk & (time < end)))


def leukfr_model(
    lib: Library, length: Tensor, z: Tensor, pair: Tensor, is_at_risk: Tensor, died: Tensor
) -> None:
    """The same with an effect of each of 21 pairs of patients."""
    beta = normal(lib, "beta", 1e3)
    tau = precision(lib, "tau")
    with lib.plate("pairs", 21, dim=-1):
        b = effect(lib, "b", tau)
    with lib.plate("intervals", len(length), dim=-2):
        hazard = lib.sample("dL0", lib.dist.Gamma(0.1 * length[:, None] * 1e-3, 1e-3))
        with lib.plate("patients", len(z), dim=-1):
            rate = lib.arrays.exp(beta * z + b[..., pair]) * hazard
            lib.sample("died", lib.dist.Poisson(rate).mask(is_at_risk), obs=died)


def leukfr() -> Subject:
    length, z, is_at_risk, died = leuk()[1]
    return leukfr_model, (length, z, *indices("leukfr", "pair"), is_at_risk, died)


EXAMPLES: dict[str, Callable[[], Subject]] = {
    made.__name__: made
    for made in (
        *(rats, pump, dogs, seeds, surgical, magnesium, salm, equiv, dyes, stacks),
        *(epil, blocker, oxford, lsat, mice, kidney, leuk, leukfr),
    )
}


def subject(name: str, lib: Library = PYRO) -> Subject:
    """A model and its data, which are tensors."""
    model, data = EXAMPLES[name]()
    return partial(model, lib), data
