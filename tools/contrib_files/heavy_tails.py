# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""
A guide of a skewed and a heavy-tailed latent, with and without hinges in front of its scale.

The density of the latents is normalized, so that an exact guide has an ELBO of 0.
"""

import argparse

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO

from pyro_artransform.flows import FlowDistribution, hinged_marginals
from pyro_artransform.flows.transforms import ComposedTransform, LocationScale


def model():
    pyro.sample("skewed", dist.Gumbel(0.0, 1.0))
    pyro.sample("heavy", dist.StudentT(3.0, 0.0, 1.0))


def make_guide(with_hinges):
    parts = [LocationScale(torch.zeros(2), 1.0, full_rank=True)]
    if with_hinges:
        parts.insert(0, hinged_marginals(2))
    flow = ComposedTransform(*parts)

    def guide():
        pyro.module("flow", flow)
        base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        posterior = FlowDistribution(base, flow)
        z = pyro.sample("z", posterior, infer={"is_auxiliary": True})
        pyro.sample("skewed", dist.Delta(z[..., 0]))
        pyro.sample("heavy", dist.Delta(z[..., 1]))

    return guide


def main(args):
    for with_hinges in (False, True):
        pyro.clear_param_store()
        pyro.set_rng_seed(args.seed)
        guide = make_guide(with_hinges)
        optim = pyro.optim.ClippedAdam(
            {"lr": args.learning_rate, "lrd": 0.1 ** (1 / args.num_steps)}
        )
        elbo = Trace_ELBO(num_particles=100, vectorize_particles=True)
        svi = SVI(model, guide, optim, elbo)
        for _ in range(args.num_steps):
            svi.step()
        many = Trace_ELBO(num_particles=20000, vectorize_particles=True)
        with torch.no_grad():
            loss = many.loss(model, guide)
        print(f"{'with' if with_hinges else 'without'} hinges: ELBO {-loss:.3f}")


if __name__ == "__main__":
    assert pyro.__version__.startswith("1.9")
    parser = argparse.ArgumentParser(description="Hinges for tails")
    parser.add_argument("-n", "--num-steps", default=1000, type=int)
    parser.add_argument("-lr", "--learning-rate", default=0.03, type=float)
    parser.add_argument("--seed", default=0, type=int)
    main(parser.parse_args())
