# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""What capturing the operations of a gradient, and of a step of a fit, saves.

    python benchmarks/capture.py [POSTERIOR ...] [--write]

Milliseconds of CPU for 64 draws, in float64: the gradient of the density of a model, as chains of a Gaussian
guide take it, and the loss of `AutoIAF` with the gradients of all parameters; called, and replayed.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from measuring import pages
from models.unseen import MODELS
from torch import Tensor

from pyro_artransform import AutoIAF
from pyro_artransform.diagnostics.importance_weights import ModelAndGuide
from pyro_artransform.model.coordinates.centering import non_centered
from pyro_artransform.model.graphs.dependencies import value_and_gradient
from pyro_artransform.model.replay.capture import Captured

NUM_DRAWS, NUM_CALLS = 64, 50


def milliseconds(call: Callable[[], object]) -> float:
    for _ in range(20):  # so that it is captured
        call()
    began = time.process_time()
    for _ in range(NUM_CALLS):
        call()
    return 1e3 * (time.process_time() - began) / NUM_CALLS


def row(name: str) -> list[str]:
    torch.manual_seed(0)
    model, data = MODELS[name]()
    guide = AutoIAF(model)
    subject = ModelAndGuide.of(model, guide, data, {})
    log_joint = non_centered(subject.log_joint)
    points = log_joint.start + 0.1 * torch.randn(NUM_DRAWS, log_joint.latents.latent_dim)
    parameters = [p for p in guide.parameters() if p.requires_grad]

    def step() -> tuple[Tensor, ...]:
        with torch.enable_grad():
            z, log_q = guide.rsample_and_log_prob(NUM_DRAWS, path=True)
            loss = (log_q - subject.log_joint(z)).mean()
            options = {"allow_unused": True, "materialize_grads": True}
            return loss.detach(), *torch.autograd.grad(loss, parameters, **options)

    gradient = partial(value_and_gradient, log_joint)
    both: list[tuple[Callable[..., object], tuple[Tensor, ...]]] = [
        (gradient, (points,)),
        (step, ()),
    ]
    cells = [name, str(log_joint.latents.latent_dim)]
    for function, inputs in both:
        captured = Captured(function)
        called, replayed = (milliseconds(partial(f, *inputs)) for f in (function, captured))
        cells += [f"{called:.1f}", f"{replayed:.1f}" if captured.can_replay else "-"]
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("posteriors", nargs="*", default=list(MODELS))
    parser.add_argument("--write", action="store_true", help="the table, into capture.md")
    options = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    heads = ["posterior", "latents", "gradient, called", "replayed", "step, called", "replayed"]
    text = pages.table(heads, map(row, options.posteriors))
    print(text)
    if options.write:
        pages.write(text, Path(__file__).with_suffix(".md"))


if __name__ == "__main__":
    main()
