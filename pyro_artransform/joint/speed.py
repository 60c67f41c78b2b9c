# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""How long a model takes for many draws, said before a fit that would take long begins."""

import time
import warnings

import torch

from .density import LogJoint

_NUM_DRAWS, _FEW_DRAWS = 64, 4
_SLOW = 2.0  # seconds
# how far the draws are from the start
_SPREAD = 0.1
HOW_TO = (
    "Write it without branches on values of its latents, and index from the right "
    "(docs/vectorization.md), or take fewer num_particles"
)


def warn_if_slow(log_joint: LogJoint, looped_because: str, stacklevel: int = 1) -> None:
    """Warns of a model that is run for one draw after the other, or takes two seconds for 64 draws.

    :param looped_because: why it is run so, if it is.
    """
    seconds = seconds_of_gradient(log_joint)
    expected = (
        f"The log density of {_NUM_DRAWS} draws and its gradient take about {seconds:.0f} seconds, a "
        f"thousand such steps {seconds * 1000 / 60:.0f} minutes"
    )
    if looped_because:
        words = (
            "the model cannot be evaluated at many draws at once, so that it is run for one draw "
            f"after the other, which is slow ({looped_because}). "
        )
        words += f"{expected}. {HOW_TO}" if seconds > _SLOW else HOW_TO
    elif seconds > _SLOW:
        words = f"the model is slow. {expected}, by the strategy '{log_joint.strategy}'"
        if log_joint.obstacle:
            words += (
                f", since the next faster one does not suit it ({log_joint.obstacle}). {HOW_TO}"
            )
    else:
        return
    warnings.warn(words, stacklevel=stacklevel + 1)


def seconds_of_gradient(log_joint: LogJoint) -> float:
    """Wall seconds of the log density of 64 draws near the start and its gradient, estimated by a few."""
    # the draws take no random numbers of the caller
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        start = log_joint.start.detach()
        draws = start + _SPREAD * torch.randn_like(start.expand(_NUM_DRAWS, -1))
        for count in (_FEW_DRAWS, _NUM_DRAWS):
            z, began = draws[:count].requires_grad_(), time.perf_counter()
            total = log_joint(z).sum()
            if total.requires_grad:
                torch.autograd.grad(total, z, allow_unused=True)
            seconds = (time.perf_counter() - began) * (_NUM_DRAWS // count)
            if seconds < _SLOW or log_joint.strategy == "loop":
                break
    return seconds
