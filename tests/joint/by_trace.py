# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""The log joint density as Pyro has it, which every other way is compared with."""

from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch.distributions import biject_to

from pyro_artransform.joint.handlers import UnmaskedLatents


def trace_of(model):
    return poutine.trace(model).get_trace()


def by_trace(model, z, trace_of=trace_of):
    """The log joint density at one draw, from Pyro's trace of the conditioned model, and the Jacobian.

    Masked elements of latents have their prior density, as the package documents.
    """
    values, total, start = {}, 0.0, 0
    for name, site in trace_of(model).iter_stochastic_nodes():
        if site_is_subsample(site):
            continue
        bijection = biject_to(site["fn"].support)
        shape = bijection.inverse_shape(site["value"].shape)
        part = z[start : start + shape.numel()].reshape(shape).to(site["value"].dtype)
        values[name] = bijection(part)
        total = total + bijection.log_abs_det_jacobian(part, values[name]).sum()
        start += shape.numel()
    assert start == len(z)
    return total + trace_of(poutine.condition(UnmaskedLatents()(model), values)).log_prob_sum()
