# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""The posteriors of chains.md by name."""

from collections.abc import Callable
from functools import partial

from models import hierarchies, paths, regressions
from models.library import Library, Model, Subject
from models.priors import funnel_with_data
from models.regressions import regression

#: for Pyro, and in another form for NumPyro (`in_numpyro.py`)
LARGE: dict[str, Callable[[], Subject]] = {
    "hierarchy": hierarchies.hierarchy,
    "volatility": paths.volatility,
    "item responses": hierarchies.items,
    "funnel": lambda: (funnel_with_data, (100,)),
}
#: for either library
BOUND: dict[str, Callable[[Library], Model]] = {
    "schools, centred": partial(hierarchies.schools, centred=True),
    "schools, non-centred": partial(hierarchies.schools, centred=False),
    "autoregression": partial(regression, data=regressions.autoregression_data),
    "survey": partial(regression, data=regressions.survey_data),
    "cancer": regressions.logistic,
    "chain": paths.chain,
    "state space": paths.states,
    "counts on a grid": paths.field,
    "groups": hierarchies.groups,
    "regression": partial(regression, data=regressions.rows_data),
    "logistic_horseshoe": regressions.logistic_horseshoe,
    "walk": paths.white_walk,
}
NAMES = (*LARGE, *BOUND)
