# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Cases about dtypes, devices and compilers."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import pyro
import torch
from pyro.infer import JitTrace_ELBO, Trace_ELBO
from torch import Tensor, nn

from pitfalls import models
from pitfalls.subject import NotApplicable, Subject, parameters, prepare, train
from pyro_artransform.testing.contracts import default_dtype
from tests.factory_calls import bare_factory_calls

FLOATS = (torch.float32, torch.float64)


def f21_dtypes(subject: Subject) -> None:
    """The dtype is that of the input and of the model, under either default."""
    for dtype, default in itertools.product(FLOATS, FLOATS):
        with default_dtype(default):
            where = f"{dtype} under default {default}"
            for family in subject.families:
                _check_flow_dtype(subject, family, dtype, f"{family}, {where}")
            try:
                _check_guide_dtype(subject, dtype, where)
            except NotApplicable:
                continue


def _check_flow_dtype(subject: Subject, family: str, dtype: torch.dtype, where: str) -> None:
    flow = subject.scramble(subject.flow(3, family)).to(dtype)
    x = torch.randn(4, 3, dtype=dtype)
    y, ladj = subject.call_and_ladj(flow, x)
    y = y.detach().clone()
    results = {"T(x)": y, "ladj": ladj, "inverse": subject.inverse(flow, y)}
    for inverse in (False, True):
        q = subject.distribution(flow, 3, inverse)
        results["sample"] = q.sample((4,))
        results["log_prob of a draw"] = q.log_prob(q.rsample((4,)))
        results["log_prob"] = q.log_prob(x)
        for name, value in results.items():
            assert value.dtype == dtype, f"{where}: {name} is {value.dtype}"
    q.log_prob(x).sum().backward()
    for name, parameter in flow.named_parameters():
        assert parameter.dtype == dtype, f"{where}: {name} is {parameter.dtype}"


def _check_guide_dtype(subject: Subject, dtype: torch.dtype, where: str) -> None:
    prepare_default = torch.get_default_dtype()
    prepare()
    torch.set_default_dtype(prepare_default)
    data = torch.tensor(models.DATA, dtype=dtype)
    guide = subject.guide(models.regression_on)
    for name, value in guide(data).items():
        assert value.dtype == dtype, f"{where}: the guide draws {name} as {value.dtype}"
    train(guide, models.regression_on, 2, data)
    for name, value in guide(data).items():
        assert value.dtype == dtype, f"{where}, after SVI: the guide draws {name} as {value.dtype}"
    for name, parameter in guide.named_parameters():
        assert parameter.dtype == dtype, f"{where}: parameter {name} is {parameter.dtype}"
    z = guide.get_posterior().sample((2,))
    assert z.dtype == dtype, f"{where}: the posterior draws {z.dtype}"


def f22_devices(subject: Subject) -> None:
    """Every tensor moves with ``to``; none is made on the default device behind one's back."""
    for family in subject.families:
        flow = subject.scramble(subject.flow(3, family, layers=2))
        _use(subject, flow)
        where = f"{family} flow"
        _check_default_device(where, lambda f=flow: _use(subject, f))
        _check_moved(where, flow.to("meta"))
        with torch.device("meta"):
            _check_moved(f"{where} built there", subject.flow(3, family, layers=2))
    try:
        guide = subject.guide(models.regression_on)
    except NotApplicable:
        pass
    else:
        data = torch.tensor(models.DATA)
        train(guide, models.regression_on, 2, data)
        # without Adam: that of older PyTorch counts its steps on the default device
        gradients = Trace_ELBO().loss_and_grads
        _check_default_device("guide", lambda: [gradients(models.regression_on, guide, data)])
        _check_moved("guide", guide.to("meta"))
    for path in _python_files(subject.sources):
        faults = [f"{path.name}:{line}: {text}" for line, text in bare_factory_calls(path)]
        assert not faults, f"made without dtype and device: {'; '.join(faults[:3])}"


def _use(subject: Subject, flow) -> Iterator[Tensor]:
    y, ladj = subject.call_and_ladj(flow, torch.zeros(4, 3, device="cpu") + 0.5)
    x = subject.inverse(flow, y.detach().clone())
    q = subject.distribution(flow, 3)
    return [y, ladj, x, q.log_prob(x), q.log_prob(q.rsample((2,)))]


def _check_default_device(where: str, use) -> None:
    """A tensor that lives on the CPU meets none that was made on another default device."""
    try:
        with torch.device("meta"):
            results = use()
    except (RuntimeError, NotImplementedError) as error:
        first = str(error).splitlines()[0][:100]
        raise AssertionError(f"{where}, default device changed: {first}") from error
    for value in results:
        device = value.device.type if isinstance(value, Tensor) else "cpu"
        assert device == "cpu", f"{where}, default device changed: a result on {device}"


def _check_moved(where: str, module) -> None:
    for name, value in tensors_of(module, "self"):
        assert value.device.type == "meta", f"{where}: {name} stays on {value.device}"


def tensors_of(thing, name: str, seen: set[int] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that an object holds, however deep, and where."""
    seen = set() if seen is None else seen
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        yield name, thing
    elif isinstance(thing, dict):
        for key, value in list(thing.items()):
            yield from tensors_of(value, f"{name}.{key}", seen)
    elif isinstance(thing, (list, tuple, set)):
        for i, value in enumerate(thing):
            yield from tensors_of(value, f"{name}[{i}]", seen)
    elif isinstance(thing, (nn.Module, torch.distributions.Transform)):
        yield from tensors_of(vars(thing), name, seen)


def _python_files(sources: tuple[Path, ...]) -> Iterator[Path]:
    for source in sources:
        yield from sorted(source.rglob("*.py")) if source.is_dir() else [source]


def f23_compilers(subject: Subject) -> None:
    """TorchScript's ELBO and ``torch.compile`` compute what plain Python does."""
    for family in subject.families:
        _check_compiled(subject, family)
    try:
        subject.guide(models.regression)
    except NotApplicable:
        return
    plain, compiled = (
        _three_steps(subject, elbo)
        for elbo in (Trace_ELBO(), JitTrace_ELBO(ignore_jit_warnings=True))
    )
    off = max(abs(a - b) for a, b in zip(plain[0], compiled[0], strict=True))
    assert off < 1e-8, f"JitTrace_ELBO: losses off by {off:.2g}"
    for name, value in plain[1].items():
        off = (value - compiled[1][name]).abs().max()
        assert off < 1e-8, f"JitTrace_ELBO: {name} off by {off:.2g}"


def _three_steps(subject: Subject, elbo: Trace_ELBO) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and parameters; each step from its own seed, since compiling draws numbers too."""
    prepare(5)
    guide = subject.guide(models.regression)
    guide()
    losses = []
    try:
        elbo.loss_and_grads(models.regression, guide)
        for seed in range(3):
            guide.zero_grad()
            pyro.set_rng_seed(seed)
            losses.append(elbo.loss_and_grads(models.regression, guide))
            with torch.no_grad():
                for parameter in guide.parameters():
                    parameter.sub_(1e-3 * parameter.grad)
    except Exception as error:
        first = (str(error).strip().splitlines() or ["no message"])[0][:120]
        raise AssertionError(f"{type(elbo).__name__}: {type(error).__name__}: {first}") from error
    return losses, parameters(guide)


def _check_compiled(subject: Subject, family: str) -> None:
    flow = subject.scramble(subject.flow(3, family))

    def loss(x: Tensor) -> Tensor:
        y, ladj = subject.call_and_ladj(flow, x)
        return (y.square().sum(-1) - ladj).mean()

    torch.compiler.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 3)
    results = []
    for function in (loss, compiled):
        try:
            value = function(x.clone())
            results.append((value, *torch.autograd.grad(value, list(flow.parameters()))))
        except Exception as error:
            first = (str(error).strip().splitlines() or ["no message"])[0][:120]
            raise AssertionError(f"{family}, {function.__name__}: {first}") from error
    for a, b in zip(*results, strict=True):
        off = (a - b).abs().max()
        assert off < 1e-9, f"{family}: compiled is off by {off:.2g}"
