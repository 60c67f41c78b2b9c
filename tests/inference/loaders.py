# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Models that take their data in mini-batches, and loaders of all kinds."""

import pyro
import torch
from pyro import distributions as dist
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset, WeightedRandomSampler

from pyro_artransform import AutoAmortized, AutoIAF, conditional_iaf

SIZE, DIM = 43, 3
NOISE = 0.7


def rows(size=SIZE):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, DIM, generator=generator)
    noise = NOISE * torch.randn(size, generator=generator)
    return x, x @ torch.tensor([1.0, -2.0, 0.5]) + noise


def regression(x, y, size=SIZE):
    """Its rows are a part of all."""
    weights = pyro.sample("weights", dist.Normal(torch.zeros(DIM), 3.0).to_event(1))
    with pyro.plate("data", size, subsample_size=len(x)):
        mean = (x * weights).sum(-1)
        pyro.sample("y", dist.Normal(mean, NOISE), obs=y)


def exact(x, y):
    """Mean, standard deviations and log evidence of the posterior of :func:`regression`."""
    precision = x.T @ x / NOISE**2 + torch.eye(DIM) / 9
    covariance = precision.inverse()
    marginal = NOISE**2 * torch.eye(len(x)) + 9 * x @ x.T
    evidence = dist.MultivariateNormal(torch.zeros(len(x)), marginal).log_prob(y).item()
    return covariance @ (x.T @ y) / NOISE**2, covariance.diagonal().sqrt(), evidence


def small(model):
    return AutoIAF(model, num_transforms=1, hidden_dims=8)


class Autoencoder(nn.Module):
    """A latent vector for each row, with a decoder that is the model's and an encoder."""

    def __init__(self):
        super().__init__()
        self.decoder, self.encoder = nn.Linear(2, DIM), nn.Linear(DIM, 4)

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 0.5).to_event(1), obs=x)

    def guide(self):
        flow = lambda d, c: conditional_iaf(d, c, 1, 8)  # noqa: E731
        return AutoAmortized(self.model, self.encoder, local_flow=flow)


def groups(y, size=SIZE, index=None):
    """A global mean, and a local one for each row."""
    mean = pyro.sample("mean", dist.Normal(y.new_zeros(()), 3.0))
    with pyro.plate("groups", size, subsample_size=len(y), subsample=index):
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=y)


def indexed(y, index):
    groups(y, index=index)


def plate_of_indexed(y, index):
    return pyro.plate("groups", SIZE, subsample=index, dim=-1)


def groups_evidence(y):
    covariance = 1.25 * torch.eye(SIZE) + 9 * torch.ones(SIZE, SIZE)
    return dist.MultivariateNormal(torch.zeros(SIZE), covariance).log_prob(y).item()


class Mean(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(1, 2)

    def forward(self, y, size=SIZE):
        return self.net(y[:, None])


def shuffled(*tensors, batch_size=10, **options):
    return DataLoader(TensorDataset(*tensors), batch_size=batch_size, shuffle=True, **options)


def with_generator(*tensors):
    return shuffled(*tensors, generator=torch.Generator().manual_seed(5))


def sampler_with_generator(*tensors):
    data = TensorDataset(*tensors)
    sampler = RandomSampler(
        data, replacement=True, num_samples=50, generator=torch.Generator().manual_seed(5)
    )
    return DataLoader(data, batch_size=10, sampler=sampler)


def weighted(*tensors):
    data = TensorDataset(*tensors)
    weights = torch.linspace(0.1, 1.0, len(data))
    return DataLoader(data, batch_size=10, sampler=WeightedRandomSampler(weights, 50))


def ordered(*tensors):
    return DataLoader(TensorDataset(*tensors), batch_size=10)


def listed(*tensors):
    return list(zip(*(tensor.split(10) for tensor in tensors)))


class Unknown:
    """Re-iterable, in an order of its own that nobody can restore."""

    def __init__(self, *tensors):
        self.batches = listed(*tensors)
        self.passes = 0

    def __iter__(self):
        self.passes += 1
        order = torch.randperm(
            len(self.batches), generator=torch.Generator().manual_seed(self.passes)
        )
        return (self.batches[k] for k in order)


#: those whose order follows torch's generators, or is fixed
KNOWN = {
    "shuffled": shuffled,
    "with a generator": with_generator,
    "sampler with a generator": sampler_with_generator,
    "weighted": weighted,
    "ordered": ordered,
    "a list": listed,
    "a tuple": lambda *tensors: tuple(listed(*tensors)),
}
