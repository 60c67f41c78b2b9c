# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Every distribution of Pyro that has a density: as a latent, or as a likelihood of data.

Each is a function of a location, an unconstrained tensor that broadcasts, so that it may depend on
another latent. Left out, with the reason:

- ``Stable`` has no density (``StableWithLogProb`` has one); ``Rejector`` and ``Empirical`` need a sampler
  or samples of their own;
- ``Wishart``: PyTorch has no log-determinant for positive definite matrices (LowerCholeskyTransform);
- ``ProjectedNormal`` and ``VonMises3D`` as latents: PyTorch has no bijection onto the sphere;
- ``RelaxedBernoulliStraightThrough``, ``RelaxedOneHotCategoricalStraightThrough``: what they draw is
  discrete, and their density is of another value, the relaxed one that the draw carries;
- ``MixtureSameFamily`` as a latent: PyTorch has no bijection for its support;
- ``SpanningTree``, ``OneOneMatching``, ``OneTwoMatching``, ``CoalescentTimes``: values are edges,
  permutations and times of a tree, with constraints that no bijection has.

``OMTMultivariateNormal``, ``LKJ`` and ``TruncatedPolyaGamma`` take no batches.
"""

import warnings

import torch
from pyro import distributions as dist
from torch.distributions import transforms


def positive(loc):
    return (0.3 * loc).exp()


def unit(loc):
    return 0.1 + 0.8 * loc.sigmoid()


def vector(loc, count=3):
    """Of shape ``(*, count)``, each row moved by a location."""
    return loc[..., None] + torch.linspace(-0.5, 0.5, count)


def matrix(count=3):
    return torch.eye(count) + 0.2 * torch.ones(count, count).tril(-1)


#: continuous, of numbers
NUMBERS = {
    "AffineBeta": lambda m: dist.AffineBeta(positive(m) + 1, 2.0, -1.0, 3.0),
    "AsymmetricLaplace": lambda m: dist.AsymmetricLaplace(m, positive(m), 1.5),
    "Beta": lambda m: dist.Beta(positive(m), 2.0),
    "Cauchy": lambda m: dist.Cauchy(m, 1.0),
    "Chi2": lambda m: dist.Chi2(positive(m) + 1),
    "ContinuousBernoulli": lambda m: dist.ContinuousBernoulli(unit(m)),
    "Exponential": lambda m: dist.Exponential(positive(m)),
    "FisherSnedecor": lambda m: dist.FisherSnedecor(positive(m) + 2, torch.tensor(5.0)),
    "FoldedDistribution": lambda m: dist.FoldedDistribution(dist.Normal(m, 1.0)),
    "Gamma": lambda m: dist.Gamma(positive(m), 2.0),
    "GeneralizedPareto": lambda m: dist.GeneralizedPareto(torch.zeros(()), positive(m), 0.2),
    "Gumbel": lambda m: dist.Gumbel(m, 1.0),
    "HalfCauchy": lambda m: dist.HalfCauchy(positive(m)),
    "HalfNormal": lambda m: dist.HalfNormal(positive(m)),
    "InverseGamma": lambda m: dist.InverseGamma(positive(m) + 1, 2.0),
    "Kumaraswamy": lambda m: dist.Kumaraswamy(positive(m) + 1, torch.tensor(2.0)),
    "Laplace": lambda m: dist.Laplace(m, 1.0),
    "LogNormal": lambda m: dist.LogNormal(m, 0.5),
    "Logistic": lambda m: dist.Logistic(m, 1.0),
    "MaskedDistribution": lambda m: dist.Normal(m, 1.0).mask(torch.tensor(True)),
    "MaskedMixture": lambda m: dist.MaskedMixture(
        torch.tensor(True).expand(m.shape), dist.Normal(m, 1.0), dist.Normal(m, 2.0)
    ),
    "NanMaskedNormal": lambda m: dist.NanMaskedNormal(m, 1.0),
    "Normal": lambda m: dist.Normal(m, 1.0),
    "Pareto": lambda m: dist.Pareto(torch.tensor(0.5), positive(m) + 1),
    "RelaxedBernoulli": lambda m: dist.RelaxedBernoulli(torch.tensor(0.7), logits=m),
    "SkewLogistic": lambda m: dist.SkewLogistic(m, 1.0, 1.5),
    "SoftAsymmetricLaplace": lambda m: dist.SoftAsymmetricLaplace(m, 1.0, 1.5, 0.7),
    "SoftLaplace": lambda m: dist.SoftLaplace(m, 1.0),
    "StableWithLogProb": lambda m: dist.StableWithLogProb(1.7, 0.1, positive(m), 0.3),
    "StudentT": lambda m: dist.StudentT(4.0, m, 1.0),
    "TransformedDistribution": lambda m: dist.TransformedDistribution(
        dist.Normal(m, 1.0), [transforms.SigmoidTransform(), transforms.AffineTransform(1.0, 2.0)]
    ),
    "TruncatedPolyaGamma": lambda m: dist.TruncatedPolyaGamma(prototype=torch.zeros(())).expand(
        m.shape
    ),
    "Uniform": lambda m: dist.Uniform(torch.tensor(-1.0), torch.tensor(2.0)).expand(m.shape),
    "VonMises": lambda m: dist.VonMises(m, 2.0),
    "Weibull": lambda m: dist.Weibull(positive(m), torch.tensor(1.5)),
    "ImproperUniform": lambda m: dist.ImproperUniform(dist.constraints.positive, m.shape, ()),
}

#: continuous, of vectors and matrices
VECTORS = {
    "Dirichlet": lambda m: dist.Dirichlet(vector(m).exp()),
    "Independent": lambda m: dist.Gamma(vector(m).exp(), 1.0).to_event(1),
    "LKJ": lambda m: dist.LKJ(3, positive(m) + 0.5),
    "LKJCholesky": lambda m: dist.LKJCholesky(3, positive(m) + 0.5),
    "LogisticNormal": lambda m: dist.LogisticNormal(vector(m, 2), torch.ones(2)),
    "LowRankMultivariateNormal": lambda m: dist.LowRankMultivariateNormal(
        vector(m), torch.ones(3, 1), torch.ones(3)
    ),
    "MultivariateNormal": lambda m: dist.MultivariateNormal(vector(m), scale_tril=matrix()),
    "MultivariateStudentT": lambda m: dist.MultivariateStudentT(
        torch.tensor(5.0), vector(m), matrix()
    ),
    "NanMaskedMultivariateNormal": lambda m: dist.NanMaskedMultivariateNormal(
        vector(m), scale_tril=matrix()
    ),
    "OMTMultivariateNormal": lambda m: dist.OMTMultivariateNormal(vector(m), matrix()),
    "RelaxedOneHotCategorical": lambda m: dist.RelaxedOneHotCategorical(
        torch.tensor(0.8), logits=vector(m)
    ),
    "ordered": lambda m: dist.TransformedDistribution(
        dist.Normal(vector(m), 1.0).to_event(1), [dist.transforms.OrderedTransform()]
    ),
    "MixtureOfDiagNormals": lambda m: dist.MixtureOfDiagNormals(
        vector(m, 2)[..., None].expand((*m.shape, 2, 3)),
        torch.ones((*m.shape, 2, 3)),
        torch.zeros((*m.shape, 2)),
    ),
    "SineBivariateVonMises": lambda m: dist.SineBivariateVonMises(
        m, -m, torch.tensor(2.0), torch.tensor(2.0), torch.tensor(0.3)
    ),
    "GaussianHMM": lambda m: dist.GaussianHMM(
        dist.Normal(m[..., None], 1.0).to_event(1),
        torch.eye(1),
        dist.Normal(torch.zeros(1), 1.0).to_event(1),
        torch.eye(1),
        dist.Normal(torch.zeros(1), 1.0).to_event(1),
        duration=3,
    ),
}

LATENTS = {**NUMBERS, **VECTORS}

#: the others, which are likelihoods only
LIKELIHOODS = {
    "Bernoulli": lambda m: dist.Bernoulli(logits=m),
    "BetaBinomial": lambda m: dist.BetaBinomial(positive(m), 2.0, 5),
    "Binomial": lambda m: dist.Binomial(5, logits=m),
    "Categorical": lambda m: dist.Categorical(logits=vector(m)),
    "DirichletMultinomial": lambda m: dist.DirichletMultinomial(vector(m).exp(), 5),
    "DiscreteHMM": lambda m: dist.DiscreteHMM(
        torch.zeros(2),
        torch.tensor([[-0.3, -1.4], [-1.4, -0.3]]),
        dist.Normal(vector(m, 2)[..., None, :], 1.0),
        duration=3,
    ),
    "ExtendedBinomial": lambda m: dist.ExtendedBinomial(torch.tensor(5.0), logits=m),
    "ExtendedBetaBinomial": lambda m: dist.ExtendedBetaBinomial(
        positive(m), torch.tensor(2.0), torch.tensor(5.0)
    ),
    "GammaPoisson": lambda m: dist.GammaPoisson(positive(m), 1.0),
    "Geometric": lambda m: dist.Geometric(logits=m),
    "LogNormalNegativeBinomial": lambda m: dist.LogNormalNegativeBinomial(
        torch.tensor(5.0), logits=m, multiplicative_noise_scale=torch.tensor(0.5)
    ),
    "MixtureSameFamily": lambda m: dist.MixtureSameFamily(
        dist.Categorical(torch.tensor([0.3, 0.7]).expand((*m.shape, 2))),
        dist.Normal(vector(m, 2), 1.0),
    ),
    "Multinomial": lambda m: dist.Multinomial(5, logits=vector(m)),
    "NegativeBinomial": lambda m: dist.NegativeBinomial(5.0, logits=m),
    "OneHotCategorical": lambda m: dist.OneHotCategorical(logits=vector(m)),
    "OrderedLogistic": lambda m: dist.OrderedLogistic(m, torch.tensor([-1.0, 1.0])),
    "Poisson": lambda m: dist.Poisson(positive(m)),
    "ProjectedNormal": lambda m: dist.ProjectedNormal(vector(m)),
    "VonMises3D": lambda m: dist.VonMises3D(vector(m)),
    "Unit": lambda m: dist.Unit(-(m**2)),
    "ZeroInflatedNegativeBinomial": lambda m: dist.ZeroInflatedNegativeBinomial(
        torch.tensor(5.0), logits=m, gate=torch.tensor(0.2)
    ),
    "ZeroInflatedPoisson": lambda m: dist.ZeroInflatedPoisson(positive(m), gate=torch.tensor(0.2)),
    "Wishart": lambda m: dist.Wishart(
        torch.tensor(4.0), scale_tril=positive(m)[..., None, None] * matrix()
    ),
    **LATENTS,
}

WITHOUT_BATCHES = {"OMTMultivariateNormal", "LKJ", "TruncatedPolyaGamma"}


def datum(name, shape):
    """A value of a likelihood, of a batch shape."""
    distribution = LIKELIHOODS[name](torch.full(shape, 0.2))
    if name in ("ImproperUniform", "Unit", "LogNormalNegativeBinomial"):
        return torch.ones(distribution.shape())
    if name == "VonMises3D":
        return torch.nn.functional.normalize(torch.ones(distribution.shape()), dim=-1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Wishart says that a draw is nearly singular
        return distribution.sample()
