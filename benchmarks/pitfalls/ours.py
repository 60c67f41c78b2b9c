# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""This package as the cases see it."""

from functools import partial
from pathlib import Path

import pyro
import torch
from pyro.infer.autoguide import init_to_mean, init_to_median
from torch import Tensor, nn

import pyro_artransform as art
from pitfalls.subject import Subject, load_whole, save_state, save_whole
from pyro_artransform import conditioners, guides, transforms, univariate

HIDDEN = 16
UNIVARIATES = {
    "affine": univariate.Affine,
    "spline": univariate.RationalQuadraticSpline,
    "monotone": univariate.MonotoneNeural,
}


class Ours(Subject):
    """``pyro_artransform``."""

    name = "pyro_artransform"
    families = ("affine", "spline")
    more_families = ("monotone",)
    log_scale_bound = 3.0
    sources = (Path(art.__file__).parent,)

    def flow(self, dim, family="affine", *, layers=1, context_dim=0):
        hidden = (max(HIDDEN, dim),) * 2
        univariate = UNIVARIATES[family]
        if layers > 1:
            if context_dim:
                return art.conditional_iaf(dim, context_dim, layers, hidden, univariate=univariate)
            return art.iaf(dim, layers, hidden, univariate=univariate)
        if family in ("affine", "spline"):
            name = f"{family}_autoregressive"
            if context_dim:
                return getattr(art, f"conditional_{name}")(dim, context_dim, hidden)
            return getattr(art, name)(dim, hidden)
        net = conditioners.MaskedMLP(dim, univariate().num_params, hidden, context_dim=context_dim)
        meta = transforms.ConditionedUnivariate(net, univariate())
        if context_dim:
            return transforms.ConditionalAutoregressiveTransform(meta)
        return transforms.AutoregressiveTransform(meta)

    def inverse_and_ladj(self, flow, y):
        return flow.inv.call_and_ladj(y)

    def inverse_module(self, flow):
        return flow.inv

    def graph_flow(self, adjacency, passes):
        net = conditioners.MaskedMLP(len(adjacency), 2, HIDDEN, adjacency=adjacency)
        meta = transforms.ConditionedUnivariate(net, univariate.Affine())
        return transforms.AutoregressiveTransform(meta, passes)

    def reordered_flows(self, dim):
        last_on_first = torch.zeros(dim, dim, dtype=torch.bool)
        last_on_first[-1, 0] = True
        graphs = {"order": range(dim)}, {"order": torch.randperm(dim)}, {"adjacency": last_on_first}
        return [art.affine_autoregressive(dim, HIDDEN, **graph) for graph in graphs]

    def hidden_flows(self, dim):
        return {
            "a lambda": _lambda_flow(dim),
            "a lambda as nonlinearity": _activation_flow(dim),
            "a module that reads what it does not own": _closure_flow(dim),
        }

    def log_scale(self, raw: Tensor) -> Tensor:
        t = transforms.MonotonicAffineTransform(raw.detach(), raw)
        return t.log_abs_det_jacobian(raw.detach(), raw.detach())

    def spline(self, widths, heights, derivatives, bound):
        t = transforms.MonotonicRQSTransform(widths, heights, derivatives, bound=bound)
        return t.call_and_ladj, t.inv.call_and_ladj

    def univariates(self):
        return {name: partial(_at_zero, make()) for name, make in UNIVARIATES.items()}

    def guide(self, model, init_loc_fn=init_to_median, init_scale=0.1):
        return guides.AutoIAF(
            model,
            num_transforms=2,
            hidden_dims=HIDDEN,
            init_loc_fn=init_loc_fn,
            init_scale=init_scale,
        )

    def sparse_guide(self, model):
        return guides.AutoStructuredFlow(model)

    def prior_guide(self, model):
        return self.guide(model, init_to_mean, 1.0)

    def constructions(self):
        affine = partial(art.affine_autoregressive, hidden_dims=HIDDEN)
        spline = partial(art.spline_autoregressive, hidden_dims=HIDDEN)
        flows = {
            "a layer": affine,
            "a spline layer": spline,
            ".inv": lambda dim: affine(dim).inv,
            "iaf": lambda dim: art.iaf(dim, 2, HIDDEN),
            "maf": lambda dim: art.maf(dim, 2, HIDDEN),
            "chain": lambda dim: transforms.chain([affine(dim), spline(dim).inv]),
            "chain, inverse": lambda dim: transforms.chain([affine(dim), spline(dim)]).inv,
            "ComposedTransform": lambda dim: transforms.ComposedTransform(affine(dim), affine(dim)),
            "iterated": partial(pyro.distributions.transforms.iterated, 2, affine),
        }
        custom = {
            name: lambda model, flow=flow: guides.AutoAutoregressive(model, flow=flow)
            for name, flow in flows.items()
        }
        options = {"num_transforms": 2, "hidden_dims": HIDDEN}
        return {
            "AutoIAF": lambda model: guides.AutoIAF(model, **options),
            "AutoMAF": lambda model: guides.AutoMAF(model, **options),
            **custom,
        }

    def fit(self, model, guide, steps, callback=None, draws=None):
        options = {"num_steps": steps, "num_particles": 16, "progress": False, "draws": draws}
        return art.fit(model, guide, callback=callback, **options)

    def trusts(self, model, guide, steps):
        return self.fit(model, guide, steps, draws=100).trusted

    def chains(self, model, n):
        found = art.mcmc(model, draws=n, seed=0, progress=False)
        return found.draws, found.trusted

    def draws(self, model, n, seed):
        found = art.fit(model, draws=n, seed=seed, progress=False)
        return found.draws, found.chains.trusted

    def trusts_batches(self, model, guide, batches, steps):
        return art.fit(model, guide, loader=batches, num_steps=steps, progress=False).trusted

    def elbo(self, model, guide):
        found = art.diagnostics.importance(model, guide, 5_000)
        return found.elbo, found.elbo_se

    def save_paths(self):
        return {
            "save": (_save, self._load),
            "param store": (_save_store, self._load_store),
            "pickle": (save_whole, load_whole),
            "state dict": (save_state, self._load_state),
        }

    def tensor_files(self):
        return {"save": _save, "state dict": save_state}

    def _load(self, path, model):
        guide = self.guide(model)
        guide.set_up()
        guide.load(path)
        return guide

    def _load_store(self, path, model):
        pyro.get_param_store().load(str(path))
        guide = self.guide(model)
        guide()
        return guide


def _at_zero(univariate: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    return univariate(x.new_zeros(*x.shape, univariate.num_params)).call_and_ladj(x)


def _save(guide, path: Path) -> None:
    guide.save(path)


def _save_store(guide, path: Path) -> None:
    pyro.get_param_store().save(str(path))


def _linear(weight: Tensor, x: Tensor):
    shift, scale = (x @ w.tril(-1).T for w in weight)
    return transforms.MonotonicAffineTransform(shift + weight[0, 0, 0], scale)


def _lambda_flow(dim: int) -> tuple[nn.Module, list[Tensor]]:
    weight = torch.randn(2, dim, dim).div(dim).requires_grad_()
    return transforms.AutoregressiveTransform(lambda x: _linear(weight, x)), [weight]


def _closure_flow(dim: int) -> tuple[nn.Module, list[Tensor]]:
    weight = torch.randn(2, dim, dim).div(dim).requires_grad_()

    class Meta(nn.Module):
        def forward(self, x: Tensor):
            return _linear(weight, x)

    return transforms.AutoregressiveTransform(Meta()), [weight]


def _activation_flow(dim: int) -> tuple[nn.Module, list[Tensor]]:
    slope = torch.ones(()).requires_grad_()
    flow = art.affine_autoregressive(dim, HIDDEN, nonlinearity=lambda h: (slope * h).tanh())
    for module in flow.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()
    return flow, [slope]
