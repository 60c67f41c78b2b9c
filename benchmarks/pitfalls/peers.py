# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Pyro, Zuko and nflows as the cases see them, and the columns of the table of ``benchmarks/peers.py``."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyro
import torch
from pyro.distributions import transforms as pyro_transforms
from pyro.infer import autoguide
from torch import Tensor, nn

from pitfalls.subject import NotApplicable, Subject

HIDDEN = 16


class Pyro(Subject):
    """Pyro's autoregressive flows, ``AutoIAFNormal`` and ``AutoNormalizingFlow``."""

    name = "Pyro flows"
    families = ("affine", "spline")
    log_scale_bound = 5.0
    sources = (
        Path(pyro_transforms.__file__).with_name("affine_autoregressive.py"),
        Path(pyro_transforms.__file__).with_name("spline_autoregressive.py"),
        Path(autoguide.__file__).with_name("guides.py"),
    )

    def flow(self, dim, family="affine", *, layers=1, context_dim=0):
        name = f"{family}_autoregressive"
        hidden = [max(HIDDEN, dim)]
        if context_dim:
            make = getattr(pyro_transforms, f"conditional_{name}")
            return make(dim, context_dim, hidden_dims=hidden)
        make = getattr(pyro_transforms, name)
        options = {"hidden_dims": hidden}
        if layers == 1:
            return make(dim, **options)
        return pyro_transforms.iterated(layers, make, dim, **options)

    def spline(self, widths, heights, derivatives, bound):
        t = pyro_transforms.Spline(1, len(widths), bound=bound, order="quadratic")
        t.unnormalized_widths.data = widths[None]
        t.unnormalized_heights.data = heights[None]
        t.unnormalized_derivatives.data = derivatives[None]
        return (
            lambda x: _flat(t, x, t.log_abs_det_jacobian),
            lambda y: _flat(t.inv, y, t.inv.log_abs_det_jacobian),
        )

    def guide(self, model, init_loc_fn=None, init_scale=None):
        return autoguide.AutoIAFNormal(model, hidden_dim=[HIDDEN], num_transforms=2)

    def prior_guide(self, model):
        def identity(dim):
            flow = self.flow(dim)
            for parameter in flow.parameters():
                nn.init.zeros_(parameter)
            return flow

        return autoguide.AutoNormalizingFlow(model, identity)

    def constructions(self):
        affine = partial(pyro_transforms.affine_autoregressive, hidden_dims=[HIDDEN])
        spline = partial(pyro_transforms.spline_autoregressive, hidden_dims=[HIDDEN])
        compose = torch.distributions.ComposeTransform
        flows = {
            "a flow": affine,
            "iterated": partial(pyro_transforms.iterated, 2, affine),
            "iterated splines": partial(pyro_transforms.iterated, 2, spline),
            ".inv": lambda dim: affine(dim).inv,
            "ComposeTransform": lambda dim: compose([affine(dim), affine(dim)]),
        }
        return {
            name: lambda model, flow=flow: autoguide.AutoNormalizingFlow(model, flow)
            for name, flow in flows.items()
        }

    def save_paths(self):
        return {"param store": (_save_store, self._load_store), **super().save_paths()}

    def tensor_files(self):
        return {"param store": _save_store, **super().tensor_files()}

    def _load_store(self, path, model):
        pyro.get_param_store().load(str(path))
        guide = self.guide(model)
        guide()
        return guide


def _flat(t, x: Tensor, ladj: Callable) -> tuple[Tensor, Tensor]:
    column = x[:, None]
    y = t(column)
    return y[:, 0], ladj(column, y).reshape(-1)


def _save_store(guide, path: Path) -> None:
    pyro.get_param_store().save(str(path))


class PyroNormal(Pyro):
    """Pyro's ``AutoMultivariateNormal``: what a guide without a flow does in the same cases."""

    name = "Pyro AutoMVN"
    families = ()
    sources = Pyro.sources[2:]

    def flow(self, dim, family="affine", *, layers=1, context_dim=0):
        raise NotApplicable("no flow")

    def spline(self, widths, heights, derivatives, bound):
        raise NotApplicable("no spline")

    def guide(self, model, init_loc_fn=autoguide.init_to_median, init_scale=0.1):
        return autoguide.AutoMultivariateNormal(model, init_loc_fn, init_scale)

    def prior_guide(self, model):
        return self.guide(model, autoguide.init_to_mean, 1.0)

    def constructions(self):
        return {"the guide": self.guide}


class Zuko(Subject):
    """Zuko's MAF and NSF as they are."""

    name = "Zuko"
    families = ("affine", "spline")
    more_families = ("monotone",)
    log_scale_bound = 6.91

    @property
    def sources(self):
        import zuko

        return (Path(zuko.__file__).parent,)

    def flow(self, dim, family="affine", *, layers=1, context_dim=0):
        import zuko

        kinds = {"affine": zuko.flows.MAF, "spline": zuko.flows.NSF, "monotone": zuko.flows.NAF}
        return kinds[family](dim, context_dim, transforms=layers, hidden_features=[HIDDEN])

    def call_and_ladj(self, flow, x, context=None):
        return flow.transform(context).call_and_ladj(x)

    def inverse(self, flow, y, context=None):
        return flow.transform(context).inv(y)

    def inverse_and_ladj(self, flow, y):
        return flow.transform().inv.call_and_ladj(y)

    def distribution(self, flow, dim, inverse=False):
        import zuko

        q = flow()
        return q if inverse else zuko.distributions.NormalizingFlow(q.transform.inv, q.base)

    def inverse_module(self, flow):
        return flow.transform.transforms[0].inv

    def apply_inverse(self, inverse, y):
        return inverse()(y)

    def graph_flow(self, adjacency, passes):
        import zuko

        with_diagonal = adjacency | torch.eye(len(adjacency), dtype=torch.bool)
        t = zuko.flows.autoregressive.MaskedAutoregressiveTransform(
            len(adjacency), adjacency=with_diagonal, hidden_features=[HIDDEN]
        )
        t.passes = passes
        return zuko.flows.Flow(t, zuko.flows.MAF(len(adjacency)).base)

    def log_scale(self, raw):
        import zuko

        return zuko.transforms.MonotonicAffineTransform(raw, raw).log_abs_det_jacobian(raw, raw)

    def spline(self, widths, heights, derivatives, bound):
        import zuko

        t = zuko.transforms.MonotonicRQSTransform(widths, heights, derivatives, bound)
        return t.call_and_ladj, lambda y: (t.inv(y), -t.call_and_ladj(t.inv(y))[1])

    def univariates(self):
        from zuko.transforms import MonotonicAffineTransform as affine
        from zuko.transforms import MonotonicRQSTransform as spline

        return {
            "affine": lambda x: affine(x.new_zeros(()), x.new_zeros(())).call_and_ladj(x),
            "spline": lambda x: spline(*map(x.new_zeros, (8, 8, 7))).call_and_ladj(x),
        }


class ZukoInPyro(Zuko):
    """Zuko through Pyro: ``ZukoToPyro``, and a transform of Zuko in ``AutoNormalizingFlow``."""

    name = "Zuko in Pyro"

    def distribution(self, flow, dim, inverse=False):
        from pyro.contrib.zuko import ZukoToPyro

        return _Rsampled(ZukoToPyro(super().distribution(flow, dim, inverse)))

    def guide(self, model, init_loc_fn=None, init_scale=None):
        return autoguide.AutoNormalizingFlow(model, self._raw)

    def _raw(self, dim):
        return Zuko.flow(self, dim, layers=2)().transform

    def prior_guide(self, model):
        def identity(dim):
            flow = Zuko.flow(self, dim)
            for parameter in flow.parameters():
                nn.init.zeros_(parameter)
            return flow().transform

        return autoguide.AutoNormalizingFlow(model, identity)

    def constructions(self):
        return {"a raw transform": self.guide}


class _Rsampled:
    """Pyro draws from a distribution by calling it; the cases by torch's names."""

    def __init__(self, q):
        self.q = q
        self.log_prob = q.log_prob

    def rsample(self, shape):
        return self.q(torch.Size(shape))

    def sample(self, shape):
        with torch.no_grad():
            return self.q(torch.Size(shape))


class Nflows(Subject):
    """The masked autoregressive transforms of nflows."""

    name = "nflows"
    families = ("affine", "spline")

    @property
    def sources(self):
        import nflows

        return (Path(nflows.__file__).parent,)

    def flow(self, dim, family="affine", *, layers=1, context_dim=0):
        from nflows import transforms

        common = {
            "features": dim,
            "hidden_features": max(HIDDEN, dim),
            "context_features": context_dim or None,
            "num_blocks": 1,
        }
        if family == "affine":
            kind, options = transforms.MaskedAffineAutoregressiveTransform, {}
        else:
            kind = transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform
            options = {"num_bins": 8, "tails": "linear", "tail_bound": 5.0}
        parts = [kind(**common, **options) for _ in range(layers)]
        return parts[0] if layers == 1 else transforms.CompositeTransform(parts)

    def call_and_ladj(self, flow, x, context=None):
        return flow(x, context)

    def inverse(self, flow, y, context=None):
        return flow.inverse(y, context)[0]

    def inverse_and_ladj(self, flow, y):
        return flow.inverse(y)

    def inverse_module(self, flow):
        from nflows.transforms import InverseTransform

        return InverseTransform(flow)

    def apply_inverse(self, inverse, y):
        return inverse(y)[0]

    def distribution(self, flow, dim, inverse=False):
        return _NflowsDistribution(flow if inverse else self.inverse_module(flow), dim)

    def spline(self, widths, heights, derivatives, bound):
        from nflows.transforms.splines import unconstrained_rational_quadratic_spline as spline

        def univariate(x, inverse):
            n = (len(x), -1)
            return spline(
                x,
                widths.expand(*n),
                heights.expand(*n),
                derivatives.expand(*n),
                inverse=inverse,
                tail_bound=bound,
            )

        return partial(univariate, inverse=False), partial(univariate, inverse=True)


class _NflowsDistribution:
    """A flow of nflows under torch's names; it draws through the inverse of its transform."""

    def __init__(self, transform, dim):
        from nflows.distributions import StandardNormal
        from nflows.flows import Flow

        self.flow = Flow(transform, StandardNormal([dim]))
        self.flow.to(next(transform.parameters()).dtype)
        self.log_prob = self.flow.log_prob

    def rsample(self, shape):
        return self.flow.sample(*shape)

    def sample(self, shape):
        with torch.no_grad():
            return self.rsample(shape)


def ours(folder: Path) -> Subject:
    """This package."""
    from pitfalls.ours import Ours

    return Ours(folder)


#: For each column: how to make the subject, and the packages that it needs.
SUBJECTS: dict[str, tuple[Callable[[Path], Subject], tuple[str, ...]]] = {
    "pyro_artransform": (ours, ("pyro_artransform",)),
    "Pyro flows": (Pyro, ("pyro-ppl",)),
    "Pyro AutoMVN": (PyroNormal, ("pyro-ppl",)),
    "Zuko": (Zuko, ("zuko",)),
    "Zuko in Pyro": (ZukoInPyro, ("zuko", "pyro-ppl")),
    "nflows": (Nflows, ("nflows",)),
}
