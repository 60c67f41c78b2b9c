# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""A fit that has started, saved to a file between two steps, and read from it."""

import warnings
from functools import partial
from typing import Any, cast

import pyro
import torch
from torch import nn

from .. import files
from .initialization.start import InitialGuide
from .set_up import SetUp, StartedFit

_FORMAT = "pyro_artransform fit 6"


def save(fit: StartedFit, path: files.FilePath) -> bool:
    """Saves everything that a fit needs to go on; where the disk refuses, it warns, and returns ``False``."""
    guide, training, stream = fit.set_up.subject.guide, fit.training, fit.set_up.stream
    state = {
        "guide": guide.state_dict() if isinstance(guide, nn.Module) else None,
        "num_steps": training.schedule.num_steps,
        "num_particles": training.num_particles,
        "optim": fit.set_up.optim is not None,
        "seconds": fit.seconds,
        "start": fit.initial.name,
        "start_elbo": fit.initial.elbo,
        "training": training.state(),
        "batches": stream and [stream.num_batches, stream.next_epoch],
        "random": {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()},
    }
    try:
        files.write(path, {"format": _FORMAT, "state": state})
    except (OSError, RuntimeError) as error:  # torch reports a full disk by either
        warnings.warn(
            f"checkpoint: {path} could not be written, so that the fit goes on without; an earlier "
            f"file stays as it was ({error}). Is the disk full?",
            stacklevel=4,
        )
        return False
    return True


def resume(set_up: SetUp, path: files.FilePath) -> StartedFit:
    """Goes on from where a checkpoint has left another fit, or from the next epoch of its loader."""
    state = set_up.by_first("the checkpoint", partial(_read, path))
    batches = state["batches"]
    options = {"num_steps": set_up.schedule.num_steps, "num_particles": set_up.num_particles}
    for name, got in options.items():
        if got not in (state[name], None):
            raise ValueError(f"resume: expected {name}={state[name]!r}, as before, got {got!r}")
    both = {"optim": (state["optim"], set_up.optim is not None)}
    both["loader"] = batches is not None, set_up.stream is not None
    for name, (had, has) in both.items():
        if had != has:
            was = f"with {name}=, got none" if had else f"without {name}=, got one"
            raise ValueError(f"resume: the checkpoint was made {was}")
    if state["guide"] is not None:
        guide: Any = set_up.subject.guide
        try:
            guide.load_state_dict(state["guide"])
        except (AttributeError, RuntimeError) as error:
            raise ValueError(f"resume: expected a checkpoint of this guide: {error}") from error
    training = set_up.new_training(set_up.schedule.of_length(state["num_steps"]))
    training.restore(state["training"])
    torch.set_rng_state(state["random"]["cpu"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["random"]["cuda"])
    if set_up.parallel is not None:
        pyro.set_rng_seed(set_up.parallel.seed() + set_up.parallel.rank)
    if set_up.stream is not None:
        set_up.stream.go_on(*batches)
    initial = InitialGuide(state["start"], state["start_elbo"])
    return StartedFit(set_up, training, initial, state["seconds"])


def _read(path: files.FilePath) -> dict[str, Any]:
    """The state that :func:`save` wrote."""
    saved = files.read(path)
    if isinstance(saved, dict) and saved.get("format") == _FORMAT:
        return cast(dict[str, Any], saved["state"])
    raise ValueError(f"{path}: expected a checkpoint of fit, got another file, or a damaged one")
