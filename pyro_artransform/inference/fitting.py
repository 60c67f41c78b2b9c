# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The function ``fit``: its arguments and options; ``stages.py`` has what it does, from top to bottom."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing
from functools import partial
from typing import Any

import torch
from torch.distributions import Distribution

from .._base.arguments import check_call, check_callable, check_flag, check_integer
from .._base.processes import open_processes
from .._base.progress import alone, progress_bar, seeded
from .._base.time_limit import TimeLimit
from .loader import Batch, BatchStream
from .problem import Problem
from .result import FitResult
from .stages import Fit


def fit(
    model: Callable[..., Any],
    *args: Any,
    guide: Callable[..., Any] | None = None,
    num_steps: int | None = None,
    num_particles: int | None = None,
    seed: int | None = None,
    progress: bool = True,
    callback: Callable[[int, float], Any] | None = None,
    loader: Iterable[Any] | None = None,
    epochs: int | None = None,
    draws: int | None = None,
    relabel: bool = True,
    max_seconds: float | None = None,
    **kwargs: Any,
) -> FitResult:
    """Draws from a posterior, trains a guide, and judges both, with nothing to tune.

    Call it as ``fit(model, guide, *args)``, or as ``fit(model, *args)`` to let it choose the guide. The
    chosen guide is ``result.guide``, and ``print(result)`` gives the reason: ``AutoIAF`` for few latents,
    ``AutoStructuredFlow`` for many, ``AutoAmortized`` for latents in a subsampled plate. A callable second
    positional argument is taken as the guide. If the model's own first argument is callable, pass it by name,
    or pass the guide as ``guide=``.

    The fit first draws from the posterior with many short Hamiltonian chains, and the verdict begins with
    these draws (``docs/chains.md``). A guide of this package starts at its current parameters or at the
    Gaussian that matches the draws and the gradients of the density there, whichever has the larger ELBO. It
    is trained with the path gradient, unless its importance weights show that it already is the posterior.
    Any other Pyro guide is trained with Pyro's ELBO from its current parameters. Once the ELBO stops moving,
    or little is left to gain, smaller steps continue from the average of the parameters. Parameters of the
    model are trained too; the result then has no draws unless you ask for them, by chains at the final
    values. The verdict on the guide uses draws that were not used in training.

    When the chains end, the progress bar prints the verdict on the draws. For draws alone use
    :func:`~pyro_artransform.mcmc`, or Ctrl-C from there on. A model without data is not trained, unless
    ``num_steps`` requests it.

    With a ``loader`` each step sees the next mini-batch. The model then needs its rows in ``pyro.plate(name,
    number of all rows, subsample_size=len(batch))``, which scales a batch up to all data, except where every
    latent belongs to a row of the batch, as in a variational autoencoder. Per-row latents need a guide that
    reads the batch, such as ``AutoAmortized``. Latents in plates that rows index, such as users and items,
    have an ``AutoStructuredFlow``, which starts without chains. The verdict makes another pass over the
    loader, for all data, or for each element with latents of its own (``docs/minibatches.md``). A loader of
    one batch with all data is equivalent to arguments. A short last batch is weighted by its number of rows.

    An error in the start, the training or the verdict of the guide, such as a density that is not finite
    there, leaves draws of chains as they are: the verdict names it, and the guide is not trusted.

    Operations that are the same in each step are captured and replayed, also with other mini-batches of the
    same shapes, so the model's Python code runs only occasionally: do not count steps in it. If such a run
    differs from the replay, for example because a callback changed something, training goes back to the last
    run that agreed.

    Ctrl-C, like ``max_seconds``, ends chains and steps; a verdict on the fit so far follows within a second.
    A quarter of ``max_seconds`` is reserved for the verdict. A second Ctrl-C interrupts.
    Under ``torchrun``, or if ``torch.distributed`` is initialized, all processes share one fit, with the
    same model, guide, data, options and result (``docs/minibatches.md``).

    :param model: a Pyro model.
    :param args: the guide, if there is one, and, without a loader, the arguments of model and guide.
    :param guide: any Pyro guide for the model. :mod:`pyro_artransform.model.protocols` describes what a
        guide may offer beyond Pyro's interface.
    :param num_steps: the number of steps; by default the fit decides when to stop.
    :param num_particles: draws per step; by default 128, or 64 for ``AutoStructuredFlow`` with 200 latents or
        more; with a ``loader`` 64 and 16.
    :param seed: makes the fit reproducible and restores the generators afterwards. This includes the order
        of a ``DataLoader(shuffle=True)``, unless the loader has a generator of its own.
    :param progress: whether to show a progress bar.
    :param callback: called after each step with its number, starting at 1, and its ELBO in nats, which is
        not finite if the step was skipped. The fit ends when it returns ``True``. It may save the guide now
        and then, from whose parameters a later fit starts.
    :param loader: a ``DataLoader``, or another iterable of mini-batches that can be iterated repeatedly,
        such as a list. A tuple or list holds the arguments of model and guide, a mapping their keyword
        arguments, a tensor is their only argument.
    :param epochs: the number of passes over the loader, instead of ``num_steps``.
    :param draws: how many effective draws of each latent, as for :func:`~pyro_artransform.mcmc`: there are at
        least as many of the worst latent, and ``result.draws`` has all draws that were kept. By default 400,
        or 100 if the model runs for one draw at a time, and fewer if the limit on trajectories is reached.
        With 0, shorter chains only initialize the guide, and no draws are returned. With a ``loader``, whose
        passes gradients would need, and for a model with parameters, the default is 0.
    :param relabel: as for :func:`~pyro_artransform.mcmc`. The guide has one image in either case.
    :param max_seconds: the wall time of the whole fit. The verdict, and the graph search of
        ``AutoStructuredFlow``, may exceed it.
    :param kwargs: the keyword arguments of model and guide; with a loader, those of every batch.
    :raises TypeError: if the arguments do not fit the model, or an option has the wrong type.
    :raises ValueError: if the model has no continuous latent, or a parameter named like an option; if
        model, guide and loader are incompatible, or the processes of a fit differ; if an option is out of
        range, or, without draws, no initial guide has a finite density.
    :raises RuntimeError: in ``torch.inference_mode``, inside one of Pyro's handlers, or if another process
        of the fit does not respond.
    :raises FitError: if, without draws, the loss is not finite for many steps in a row, or the model has
        parameters that its first run did not have.

    Example::

        >>> import pyro, pyro.distributions as dist, torch
        >>> from pyro_artransform import AutoIAF, fit
        >>> def model(y):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
        >>> guide = AutoIAF(model)
        >>> result = fit(model, guide, torch.ones(3), num_steps=50, progress=False)
        >>> result.num_steps, guide.sample_posterior(4)["loc"].shape
        (50, torch.Size([4]))
        >>> result = fit(model, torch.ones(3), num_steps=50, progress=False)  # without a guide
        >>> result.guide.sample_posterior(4)["loc"].shape, result.rows()["guide"]
        (torch.Size([4]), 'AutoIAF, for 1 latent')

    With mini-batches and a callback::

        >>> def model(y):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", 100, subsample_size=len(y)):
        ...         pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
        >>> loader, log = torch.randn(100).split(30), {}
        >>> options = {"epochs": 10, "callback": log.__setitem__, "progress": False}
        >>> fit(model, AutoIAF(model), loader=loader, **options).num_steps, len(log)
        (40, 40)

    **References**

    1. Automatic Variational Inference in Stan (Kucukelbir, Ranganath, Gelman, Blei, 2015),
       https://arxiv.org/abs/1506.03431
    2. Advances in Black-Box VI: Normalizing Flows, Importance Weighting, and Optimization (Agrawal,
       Sheldon, Domke, 2020), https://arxiv.org/abs/2006.10343
    3. Yes, but Did It Work?: Evaluating Variational Inference (Yao, Vehtari, Simpson, Gelman, 2018),
       https://arxiv.org/abs/1802.02538
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError("fit: expected to be called outside torch.inference_mode")
    # a callable is not data, unless it is a distribution of Pyro
    if guide is None and args and callable(args[0]) and not isinstance(args[0], Distribution):
        guide, args = args[0], args[1:]
    if guide is not None:
        check_callable("guide", guide, "a guide for the model, such as AutoIAF(model)")
    if loader is None and epochs is not None:
        raise ValueError("epochs: expected a loader as well, got none; without one, use num_steps")
    if epochs is not None and num_steps is not None:
        raise ValueError(f"expected epochs or num_steps, got both ({epochs} and {num_steps})")
    if loader is not None and args:
        raise ValueError(
            "expected no positional arguments of the model with a loader, whose batches are its arguments, "
            f"got {len(args)}. Keyword arguments are passed with each batch"
        )
    positive = {"num_steps": num_steps, "epochs": epochs, "num_particles": num_particles}
    for name, count in {**positive, "draws": draws, "seed": seed}.items():
        if count is not None:
            check_integer(name, count, least=int(name in positive))
    check_flag("relabel", relabel)
    check_flag("progress", progress)
    check_call(fit, model, args if loader is None else None, kwargs)
    if callback is not None:
        check_callable("callback", callback, "a function")
    with (
        alone("fit"),
        open_processes() as parallel,
        seeded(parallel.seed(seed)),
        progress_bar(progress and parallel.rank == 0) as bar,
        TimeLimit(max_seconds, bar.tick, bar.say, bar.tell) as limit,
        ExitStack() as stack,
    ):
        stream = None
        if loader is not None:
            stream = BatchStream(loader, kwargs).share(parallel, parallel.seed())
            stack.enter_context(closing(stream))
            num_steps = num_steps if epochs is None else epochs * stream.num_batches
        problem = Problem(
            model,
            guide,
            arguments=Batch(args, kwargs),
            stream=stream,
            parallel=parallel,
            limit=limit,
            check_call=partial(check_call, fit, model),
            num_steps=num_steps,
            num_particles=num_particles,
        )
        bar.say("start")
        return Fit(problem, bar, num_draws=draws, relabel=relabel, callback=callback).run()
