# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""The models of bugs_models.py for NumPyro, with the same names of latents, as they are written there."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.scipy.special import logit
from numpyro import distributions as dist
from numpyro import factor, plate, sample

Model = Callable[..., None]


def normal(name: str, sd: float = 1e3) -> Any:
    return sample(name, dist.Normal(0.0, sd))


def precision(name: str, vague: float = 1e-3) -> Any:
    return sample(name, dist.Gamma(vague, vague))


def effect(name: str, precision: Any, mean: Any = 0.0) -> Any:
    return sample(name, dist.Normal(mean, precision**-0.5))


def rats(x: Any, y: Any) -> None:
    alpha_c, beta_c = normal("alpha_c"), normal("beta_c")
    alpha_tau, beta_tau, tau_c = (precision(name) for name in ("alpha_tau", "beta_tau", "tau_c"))
    with plate("rats", y.shape[1], dim=-1):
        alpha, beta = effect("alpha", alpha_tau, alpha_c), effect("beta", beta_tau, beta_c)
        with plate("ages", len(x), dim=-2):
            mean = alpha + beta * (x - x.mean())[:, None]
            sample("y", dist.Normal(mean, tau_c**-0.5), obs=y)


def pump(t: Any, x: Any) -> None:
    alpha = sample("alpha", dist.Exponential(1.0))
    beta = sample("beta", dist.Gamma(0.1, 1.0))
    with plate("pumps", len(x)):
        theta = sample("theta", dist.Gamma(alpha, beta))
        sample("x", dist.Poisson(theta * t), obs=x)


def dogs(avoided: Any, shocked: Any, y: Any) -> None:
    alpha = -sample("minus_alpha", dist.HalfNormal(1e-5**-0.5))
    beta = -sample("minus_beta", dist.HalfNormal(1e-5**-0.5))
    with plate("trials", len(y)):
        sample("y", dist.Bernoulli(jnp.exp(alpha * avoided + beta * shocked)), obs=y)


def seeds(x1: Any, x2: Any, n: Any, r: Any) -> None:
    alpha0, alpha1 = normal("alpha0"), normal("alpha1")
    alpha2, alpha12 = normal("alpha2"), normal("alpha12")
    tau = precision("tau")
    with plate("plates", len(r)):
        logits = alpha0 + alpha1 * x1 + alpha2 * x2 + alpha12 * x1 * x2 + effect("b", tau)
        sample("r", dist.Binomial(n, logits=logits), obs=r)


def surgical(n: Any, r: Any) -> None:
    mu, tau = normal("mu"), precision("tau")
    with plate("hospitals", len(r)):
        sample("r", dist.Binomial(n, logits=effect("b", tau, mu)), obs=r)


def magnesium(nt: Any, rt: Any, nc: Any, rc: Any) -> None:
    mu, tau = sample("mu", dist.Uniform(-10.0, 10.0)), precision("tau")
    with plate("trials", len(nt)):
        theta = effect("theta", tau, mu)
        pc = sample("pc", dist.Uniform(0.0, 1.0))
        sample("rc", dist.Binomial(nc, pc), obs=rc)
        sample("rt", dist.Binomial(nt, logits=theta + logit(pc)), obs=rt)


def salm(x: Any, y: Any) -> None:
    alpha, beta, gamma, tau = normal("alpha"), normal("beta"), normal("gamma"), precision("tau")
    dose = x[:, None]
    with plate("doses", y.shape[0], dim=-2), plate("plates", y.shape[1], dim=-1):
        log_rate = alpha + beta * jnp.log(dose + 10) + gamma * dose + effect("lambda", tau)
        sample("y", dist.Poisson(jnp.exp(log_rate)), obs=y)


def equiv(treatment: Any, period: Any, y: Any) -> None:
    mu, phi, pi = normal("mu"), normal("phi"), normal("pi")
    tau1, tau2 = precision("tau1"), precision("tau2")
    with plate("subjects", y.shape[0], dim=-2):
        delta = effect("delta", tau2)
        with plate("periods", y.shape[1], dim=-1):
            mean = mu + treatment * phi / 2 + period * pi / 2 + delta
            sample("y", dist.Normal(mean, tau1**-0.5), obs=y)


def dyes(y: Any) -> None:
    theta, tau_btw, tau_with = normal("theta", 1e5), precision("tau_btw"), precision("tau_with")
    with plate("batches", y.shape[0], dim=-2):
        mu = effect("mu", tau_btw, theta)
        with plate("samples", y.shape[1], dim=-1):
            sample("y", dist.Normal(mu, tau_with**-0.5), obs=y)


def stacks(z: Any, y: Any) -> None:
    beta0, phi, tau = normal("beta0", 1e-5**-0.5), precision("phi", 1e-2), precision("tau")
    with plate("columns", z.shape[1]):
        beta = effect("beta", phi)
    with plate("days", len(y)):
        sample("y", dist.StudentT(4.0, beta0 + z @ beta, tau**-0.5), obs=y)


def epil(base: Any, treatment: Any, age: Any, fourth: Any, y: Any) -> None:
    a0, tau_b1, tau_b = normal("a0", 1e2), precision("tau_b1"), precision("tau_b")
    log_rate = a0
    columns = {"base": base, "treatment": treatment, "both": base * treatment, "age": age}
    for name, column in {**columns, "fourth": fourth}.items():
        log_rate = log_rate + normal(f"alpha_{name}", 1e2) * (column - column.mean())
    with plate("patients", y.shape[0], dim=-2):
        b1 = effect("b1", tau_b1)
        with plate("visits", y.shape[1], dim=-1):
            sample("y", dist.Poisson(jnp.exp(log_rate + b1 + effect("b", tau_b))), obs=y)


def blocker(nt: Any, rt: Any, nc: Any, rc: Any) -> None:
    d, tau = normal("d"), precision("tau")
    effect("delta_new", tau, d)
    with plate("trials", len(nt)):
        mu, delta = normal("mu", 1e-5**-0.5), effect("delta", tau, d)
        sample("rc", dist.Binomial(nc, logits=mu), obs=rc)
        sample("rt", dist.Binomial(nt, logits=mu + delta), obs=rt)


def oxford(year: Any, n0: Any, r0: Any, n1: Any, r1: Any) -> None:
    alpha, beta1, beta2 = normal("alpha"), normal("beta1"), normal("beta2")
    tau = precision("tau")
    with plate("tables", len(year)):
        mu, b = normal("mu"), effect("b", tau)
        log_ratio = alpha + beta1 * year + beta2 * (year**2 - 22) + b
        sample("r0", dist.Binomial(n0, logits=mu), obs=r0)
        sample("r1", dist.Binomial(n1, logits=mu + log_ratio), obs=r1)


def lsat(r: Any) -> None:
    beta = sample("beta", dist.HalfNormal(1e2))
    with plate("questions", r.shape[0], dim=-2):
        alpha = normal("alpha", 1e2)
    with plate("students", r.shape[1], dim=-1):
        theta = normal("theta", 1.0)
        with plate("answers", r.shape[0], dim=-2):
            sample("r", dist.Bernoulli(logits=beta * theta - alpha), obs=r)


def weibull(time: Any, censored: Any, scale: Any, scale_censored: Any, r: Any) -> None:
    sample("time", dist.Weibull(scale, r).to_event(1), obs=time)
    factor("censored", -((censored / scale_censored) ** r).sum())


def mice(group: Any, time: Any, group_censored: Any, censored: Any) -> None:
    r = sample("r", dist.Exponential(1e-3))
    with plate("groups", 4):
        scale = jnp.exp(-normal("beta", 1e-3**-0.5) / r)
    weibull(time, censored, scale[group], scale[group_censored], r)


def kidney(time: Any, x: Any, patient: Any, censored: Any, x_censored: Any, of: Any) -> None:
    alpha = normal("alpha", 1e2)
    beta_age, beta_sex = normal("beta_age", 1e2), normal("beta_sex", 1e2)
    beta_disease = sample("beta_disease", dist.Normal(jnp.zeros(3), 1e2).to_event(1))
    tau, r = precision("tau"), sample("r", dist.Gamma(1.0, 1e-3))
    with plate("patients", 38):
        b = effect("b", tau)

    def scale(x: Any, patient: Any) -> Any:
        fixed = alpha + beta_age * x[0] + beta_sex * x[1] + beta_disease @ x[2:]
        return jnp.exp(-(fixed + b[patient]) / r)

    weibull(time, censored, scale(x, patient), scale(x_censored, of), r)


def leuk(length: Any, z: Any, is_at_risk: Any, died: Any) -> None:
    deaths(normal("beta") * z, length, is_at_risk, died)


def leukfr(length: Any, z: Any, pair: Any, is_at_risk: Any, died: Any) -> None:
    beta, tau = normal("beta"), precision("tau")
    with plate("pairs", 21, dim=-1):
        b = effect("b", tau)
    deaths(beta * z + b[pair], length, is_at_risk, died)


def deaths(log_ratio: Any, length: Any, is_at_risk: Any, died: Any) -> None:
    with plate("intervals", len(length), dim=-2):
        hazard = sample("dL0", dist.Gamma(0.1 * length[:, None] * 1e-3, 1e-3))
        with plate("patients", died.shape[1], dim=-1):
            rate = jnp.exp(log_ratio) * hazard
            sample("died", dist.Poisson(rate).mask(is_at_risk), obs=died)


PEERS: dict[str, Model] = {
    model.__name__: model
    for model in (
        *(rats, pump, dogs, seeds, surgical, magnesium, salm, equiv, dyes, stacks),
        *(epil, blocker, oxford, lsat, mice, kidney, leuk, leukfr),
    )
}
