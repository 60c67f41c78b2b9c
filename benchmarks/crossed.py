# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Ratings of users and items in mini-batches: a fit, and Pyro's guides by SVI in the same seconds.

    python benchmarks/crossed.py [--sizes 1000 1500 100000] [--batch 1000] [--seconds 60] [--seeds 3]
                                 [--binary] [--double] [--guides fit AutoNormal AutoLowRankMultivariateNormal]

Under torchrun several processes share the fit; use --guides fit. Prints seconds (CPU seconds of the first
process) until the first step and in all, steps, the ELBO below the log evidence (nats), the worst
global by its mean (sds) and by its sd (%), and a and b: rms errors of means (sds) and the mean ratio of sds
(%). Exact values are those of a Gibbs sampler; for binary ratings, of chains with all data, and the evidence
is that by the guide's weights.
"""

import argparse
import math
import os
import time
from collections.abc import Iterator
from typing import Any

import pyro
import torch
from models.crossed import Crossed, Moments, Ratings, exact
from pyro.infer import SVI, Trace_ELBO, autoguide
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from pyro_artransform import fit, mcmc

_DRAWS, _DRAWS_OF_ELBO = 2000, 200
Values = dict[str, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs=3, default=[1000, 1500, 100_000])
    parser.add_argument("--batch", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--binary", action="store_true")
    parser.add_argument("--double", action="store_true")
    parser.add_argument("--guides", nargs="+", default=["fit", "AutoNormal"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = Crossed(*args.sizes, args.binary)
    data = model.data()
    reference = of_all_data(model, data) if args.binary else exact(model, data)
    if args.double:
        torch.set_default_dtype(torch.float64)
    data = data._replace(y=data.y.to(torch.get_default_dtype()))
    for k, value in reference.mean.items():
        if not value.dim():
            print(f"{k} {float(value):.4f} +- {float(reference.sd[k]):.4f}")
    print(f"log evidence {reference.log_evidence:.2f} +- {reference.log_evidence_se:.2f}")
    names = ["guide", "seed", "first step, s", "s", "steps", "below the evidence", "globals, sds"]
    names += ["their sds, %", "a, b: rms, sds", "their sds, %", "verdict"]
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")
    for name in args.guides:
        for seed in range(args.seeds):
            pyro.clear_param_store()
            pyro.set_rng_seed(seed)
            run = by_fit if name == "fit" else by_svi
            cells = run(model, data, reference, args, seed, name)
            if os.environ.get("RANK", "0") == "0":
                print(f"| {' | '.join([name, str(seed), *cells])} |", flush=True)


def loader_of(data: Ratings, batch: int) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*data), batch_size=batch, shuffle=True)


def of_all_data(model: Crossed, data: Ratings) -> Moments:
    """The moments of chains with all data, in place of exact ones; the evidence is not known."""
    draws = mcmc(model, *data, draws=1000, seed=100, progress=False).draws
    values = {name: value.double() for name, value in draws.items()}
    mean = {name: value.mean(0) for name, value in values.items()}
    return Moments(mean, {name: v.std(0) for name, v in values.items()}, math.nan, math.nan)


def clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def since(began: tuple[float, float]) -> str:
    """Wall seconds, and in brackets CPU seconds of this process."""
    wall, cpu = (now - then for now, then in zip(clocks(), began))
    return f"{wall:.1f} ({cpu:.1f})"


def by_fit(model: Any, data: Ratings, exact: Moments, args: Any, seed: int, _: str) -> list[str]:
    began, first = clocks(), list[str]()

    def callback(*_: object) -> None:
        if not first:
            first.append(since(began))

    options = {"max_seconds": args.seconds, "seed": seed, "progress": False, "callback": callback}
    result = fit(model, loader=loader_of(data, args.batch), **options)
    seconds = since(began)
    errors = compare(result.guide.sample_posterior(_DRAWS), exact)
    start = first[0] if first else "none"
    is_known = math.isfinite(exact.log_evidence)
    evidence = exact.log_evidence if is_known else result.log_evidence
    gap = f"{evidence - result.elbo:.2f} +- {result.elbo_se:.2f}"
    guide = f"{type(result.guide).__name__}, k-hat {result.khat:.2f}, trusted {result.trusted}"
    return [start, seconds, str(result.num_steps), gap, *errors, guide]


def by_svi(model: Any, data: Ratings, exact: Moments, args: Any, _: int, name: str) -> list[str]:
    """Pyro's guide with Adam, whose step size falls from 0.02 to 0.0005 in the seconds of the fit."""
    guide = getattr(autoguide, name)(model)
    began, count, size = time.perf_counter(), 0, 0.02
    optimizer = pyro.optim.ClippedAdam(lambda _: {"lr": size})
    svi = SVI(model, guide, optimizer, Trace_ELBO())
    for batch in forever(loader_of(data, args.batch)):
        share = (time.perf_counter() - began) / args.seconds
        if share > 1:
            break
        for group in optimizer.optim_objs.values():
            group.param_groups[0]["lr"] = size * 40**-share
        try:
            svi.step(*batch)
        except ValueError:  # Pyro's checks refuse parameters that are not finite
            return ["0.0", f"{share * args.seconds:.0f}", f"not finite after {count}", *[""] * 6]
        count += 1
    whole = model, guide, data
    draws = [guide(*data) for _ in range(_DRAWS)]
    values = {k: torch.stack([draw[k] for draw in draws]).detach() for k in exact.mean}
    elbo = elbo_of(*whole)
    gap = f"{exact.log_evidence - float(elbo.mean()):.2f} +- {float(elbo.std()) / len(elbo) ** 0.5:.2f}"
    return ["0.0", f"{args.seconds:.0f}", str(count), gap, *compare(values, exact), ""]


@torch.no_grad()
def elbo_of(model: Any, guide: Any, data: Ratings) -> Tensor:
    loss = Trace_ELBO().loss
    return torch.tensor([-loss(model, guide, *data) for _ in range(_DRAWS_OF_ELBO)]).double()


def forever(loader: DataLoader[Any]) -> Iterator[Any]:
    while True:
        yield from loader


def compare(draws: Values, exact: Moments) -> list[str]:
    """Errors of globals, and of a and b, from draws ``(n,) + site shape``."""
    worst, worst_sd = 0.0, 0.0
    rms, ratios = list[str](), list[str]()
    for name, mean in exact.mean.items():
        own, sd = draws[name].double(), exact.sd[name]
        error, ratio = (own.mean(0) - mean) / sd, own.std(0) / sd
        if mean.dim():
            # less the noise of the draws
            square = error.square().mean() - ratio.square().mean() / len(own)
            rms.append(f"{float(square.clamp_min(0).sqrt()):.3f}")
            ratios.append(f"{100 * float(ratio.mean() - 1):+.1f}")
        else:
            worst, worst_sd = max(worst, error.abs(), key=float), max(worst_sd, ratio - 1, key=abs)
    return [
        f"{float(worst):.2f}",
        f"{100 * float(worst_sd):+.0f}",
        ", ".join(rms),
        ", ".join(ratios),
    ]


if __name__ == "__main__":
    main()
