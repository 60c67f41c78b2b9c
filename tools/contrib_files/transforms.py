# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""
A masked autoregressive flow with the graph of a Markov chain, fitted to draws of that chain.

The density of data takes one evaluation of the network, and a draw takes the inverse. The mean negative
log-likelihood of new data ends near the entropy of the chain, which is a lower bound.
"""

import argparse
import math

import pyro
import pyro.distributions as dist
import torch

from pyro_artransform.flows import affine_autoregressive

NOISE = 0.5


def draw_chains(num_chains, length):
    """Draws of x[0] ~ Normal(0, 1), x[i] ~ Normal(sin(2 x[i-1]), NOISE)."""
    x = [torch.randn(num_chains)]
    for _ in range(length - 1):
        x.append(torch.sin(2 * x[-1]) + NOISE * torch.randn(num_chains))
    return torch.stack(x, -1)


def main(args):
    pyro.set_rng_seed(args.seed)
    dim = args.length
    neighbour = torch.ones(dim, dim).tril(-1).triu(-1).bool()  # i depends on i - 1
    transform = affine_autoregressive(dim, [8 * dim, 8 * dim], adjacency=neighbour)
    base = dist.Normal(torch.zeros(dim), 1.0).to_event(1)
    flow = dist.TransformedDistribution(base, [transform.inv])

    optim = torch.optim.Adam(transform.parameters(), lr=args.learning_rate)
    for _ in range(args.num_steps):
        optim.zero_grad()
        loss = -flow.log_prob(draw_chains(500, dim)).mean()
        loss.backward()
        optim.step()

    with torch.no_grad():
        loss = -flow.log_prob(draw_chains(10000, dim)).mean()
        noise = base.sample((1000,))
        error = (transform(transform.inv(noise)) - noise).abs().max()
    entropy = dim * 0.5 * math.log(2 * math.pi * math.e) + (dim - 1) * math.log(NOISE)
    print(f"negative log-likelihood {loss:.3f}, entropy {entropy:.3f}")
    print(f"largest error of the inverse {error:.1e}")


if __name__ == "__main__":
    assert pyro.__version__.startswith("1.9")
    parser = argparse.ArgumentParser(description="The density of a Markov chain")
    parser.add_argument("-n", "--num-steps", default=1000, type=int)
    parser.add_argument("-lr", "--learning-rate", default=0.005, type=float)
    parser.add_argument("--length", default=5, type=int)
    parser.add_argument("--seed", default=0, type=int)
    main(parser.parse_args())
