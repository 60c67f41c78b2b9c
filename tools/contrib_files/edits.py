# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""What the slice leaves out where the package has no seam: each entry is a seam that is missing."""

#: members that would come along with their classes, since Pyro or torch may call them
LEFT_OUT = {
    "pyro_artransform.guides.autoregressive.AutoAutoregressive": ["_apply"],
    "pyro_artransform.guides.persistence.persistent_guide.PersistentGuide": [
        *("get_extra_state", "set_extra_state", "_load_from_state_dict"),
    ],
}

#: by module, text that is there once, and what stands in its place
EDITS: dict[str, list[tuple[str, str]]] = {
    "pyro_artransform.guides.autoregressive": [
        (
            """from .prior_coordinates import (
    CoordinatesArgument,
    GuideInCoordinates,
    check_coordinates,
    prior_layer,
)
""",
            "from .persistence.persistent_guide import PersistentGuide\n",
        ),
        ("(GuideInCoordinates, AutoContinuous)", "(PersistentGuide, AutoContinuous)"),
        (
            """    Where the prior of a latent depends on other latents, as in a hierarchy, z is in units of the model's own
    prior, and a map that runs the model leads to the unconstrained space, so that the flow need not learn it.

""",
            "",
        ),
        (
            """    :param coordinates: "prior" for coordinates from the model's own prior; "model" for the latents as the
        model has them; or, by site, how centred they are, numbers or tensors that broadcast to the site on
        the unconstrained space: 0 in units of its prior, 1 as the model has it. See
        ``guide.prior_coordinates``. A guide that has such coordinates needs its model to draw.
""",
            "",
        ),
        (
            """is not positive, or a number of ``coordinates`` not from 0 to 1; at
        the first call, for sites of ``coordinates`` that have none from the prior, discrete latents""",
            """is not positive; at the first call, for discrete latents""",
        ),
        (
            """
    **References**

    1. Automatic Reparameterisation of Probabilistic Programs (Gorinova, Moore, Hoffman, 2020),
       https://arxiv.org/abs/1906.03028
""",
            "",
        ),
        ("example ``pyro_artransform.spline_autoregressive``", "example ``iaf``"),
        (
            "AutoAutoregressive, spline_autoregressive\n",
            "AutoAutoregressive, affine_autoregressive\n",
        ),
        ("flow=spline_autoregressive", "flow=affine_autoregressive"),
        ('        coordinates: CoordinatesArgument = "prior",\n', ""),
        ("        self.asked = check_coordinates(coordinates)\n", ""),
        ("observed, dependent = prototype.", "observed = prototype."),
        ("            arguments |= self._found_in_model(args, kwargs, bool(dependent))\n", ""),
        (
            """            if self._prior:
                self._parts[1].loc.data.copy_(self._start_coordinates(start))
""",
            "",
        ),
        (
            """        self._flow_start: dict[str, Tensor] = copy.deepcopy(flow.state_dict())
        inner = transform = ComposedTransform(flow, affine)
        self._prior = ()
        if prior := prior_layer(spec, start):
            self._prior, transform = (prior,), ComposedTransform(inner, prior)
        self._inner = (inner,)  # in a tuple, as it may be a part of the transform
        self.transform = transform
""",
            "        self.transform = ComposedTransform(flow, affine)\n",
        ),
        (
            """        spec, is_new = self._spec, bool(args or kwargs) or not self._model_is_checked
""",
            "        spec, is_new = self._spec, bool(args or kwargs)\n",
        ),
        (
            """            if not self._model_is_checked:
                prototype.refuse_other_model(spec.latents.sites, spec.observed, run)
                self._model_is_checked = True
            elif shapes""",
            "            if shapes",
        ),
        (
            """(where Pyro's
            validation is on); if the model of a guide that was loaded has other latents than the file.
""",
            """(where Pyro's
            validation is on).
""",
        ),
        (
            """        inner = self.transform_in_coordinates()
        if not self._prior or self._prior[0].coordinates.is_identity:
            return inner
        self._bind(args, kwargs)
        return self.transform

    def transform_in_coordinates(self) -> ComposedTransform:
        \"\"\"The flow, then location and scale: from the base to the coordinates that fits work in.\"\"\"
""",
            "",
        ),
        (
            "        return self._inner[0] if self._prior else transform\n",
            "        return transform\n",
        ),
        (
            "edge the density is zero: :meth:`rsample_and_log_prob` has the density of a draw of its own.",
            "edge the density is zero.",
        ),
        ("    # What a fit uses beyond Pyro's interface\n\n", ""),
    ],
    "pyro_artransform.guides.presets": [
        ("from .prior_coordinates import CoordinatesArgument\n", ""),
        (
            "import CompressedTails, FlowModule, chain\n",
            "import ComposedTransform, CompressedTails, FlowModule\n",
        ),
        (
            """    #: whether each coordinate has hinges before them
    _has_hinges: ClassVar[bool]
""",
            "",
        ),
        ('        coordinates: CoordinatesArgument = "prior",\n', ""),
        ("full_rank=full_rank, coordinates=coordinates, **start)", "full_rank=full_rank, **start)"),
        (
            """        if latent_dim == 1:
            # affine layers of one coordinate are a Gaussian together
            splines = [spline_marginals(1) for _ in range(count)]
            return chain([hinged_marginals(1), *splines, CompressedTails()])
""",
            "",
        ),
        (
            "        hinges = [hinged_marginals(latent_dim)] if cls._has_hinges else []\n",
            "",
        ),
        (
            "return chain([*hinges, layers, CompressedTails()])",
            "return ComposedTransform(layers, CompressedTails())",
        ),
        (
            """    1. :func:`~pyro_artransform.hinged_marginals`: hinges of each coordinate, for skewness and tails.
    2. ``num_transforms`` affine autoregressive layers, as :func:`~pyro_artransform.iaf` makes them,
       the first in the order of the latents, the next in the reverse order, and so on in turn.
    3. :class:`~pyro_artransform.transforms.CompressedTails`: beyond 40 units of the scale below, a
       draw goes only logarithmically far, so that models do not overflow.
    4. The location and the scale of :class:`AutoAutoregressive`.

    In one dimension, where affine layers are a Gaussian together, ``num_transforms`` splines stand in
    their place, and there are no networks. The density""",
            """    1. ``num_transforms`` affine autoregressive layers, as :func:`~pyro_artransform.iaf` makes them,
       the first in the order of the latents, the next in the reverse order, and so on in turn.
    2. :class:`~pyro_artransform.transforms.CompressedTails`: beyond 40 units of the scale below, a
       draw goes only logarithmically far, so that models do not overflow.
    3. The location and the scale of :class:`AutoAutoregressive`.

    In one dimension, where affine layers are a Gaussian together, the guide is a Gaussian. The density""",
        ),
        ("``init_scale`` and ``coordinates``: see", "``init_scale``: see"),
        ("as ``full_rank``, ``init_loc_fn``, ", "as ``full_rank``, ``init_loc_fn`` and "),
        (
            """:class:`~pyro_artransform.conditioners.TiltedSiLU` beyond. A guide with one of these, an activation
        of ``torch.nn`` or a function of ``torch`` can be saved by :meth:`~AutoAutoregressive.save`.
""",
            ":class:`~pyro_artransform.conditioners.TiltedSiLU` beyond.\n",
        ),
        ("_layers, _has_hinges = staticmethod(iaf), True", "_layers = staticmethod(iaf)"),
        (
            '"""A guide whose flow is a stack of layers of one kind, which a file can describe."""',
            '"""A guide whose flow is a stack of layers of one kind."""',
        ),
        ("        # a version with other defaults reads the same flow from a file\n", ""),
    ],
    "pyro_artransform.guides.prototype": [
        (") -> tuple[tuple[str, ...], list[str]]:", ") -> tuple[str, ...]:"),
        (
            "    :return: the sites that have data, and the latents whose prior has a location or a scale that differs.\n",
            "    :return: the sites that have data.\n",
        ),
        (
            """    scales = [
        {name: PriorScale.of(run.nodes[name]["fn"]) for name in got} for run in (first, second)
    ]
    return tuple(second.observation_nodes), depend_on_latents(*scales)
""",
            "    return tuple(second.observation_nodes)\n",
        ),
        (
            """a mini-batch. Use "
                    "AutoAmortized(model, encoder), whose encoder reads its data, or AutoAmortized(model), "
                    "which has parameters for each element; or do not sub-sample the plate"
""",
            """a mini-batch: do not "
                    "sub-sample the plate"
""",
        ),
    ],
    "pyro_artransform.guides.persistence.persistent_guide": [
        ("from ...files import FilePath\n", ""),
        (
            "    #: arguments in a spec that the constructor does not take\n    _found_arguments: ClassVar[tuple[str, ...]] = ()\n",
            "",
        ),
        (
            "        #: whether the latents are known to be the model's, and not only a file's\n        self._model_is_checked = True\n",
            "",
        ),
        (
            "a guide that was unpickled, or loaded without a model, does not have one",
            "a guide that was unpickled does not have one",
        ),
        (
            """            name = type(self).__name__
            remedy = f"guide.model = model, or {name}.load(path, model), puts one into the guide"
            raise RuntimeError(
                f"this {name} has no model: pickle drops it, load(path) has none. {remedy}"
            )
""",
            """            raise RuntimeError(
                f"this {type(self).__name__} has no model: pickle drops it. guide.model = model puts one "
                "into the guide"
            )
""",
        ),
        ("    # Files\n\n", ""),
        (
            "in the param store, in copies, in state dicts and in files",
            "in the param store and in copies",
        ),
        ("by default 10,000, and 2,000 of an amortized guide.", "by default 10,000."),
    ],
    "pyro_artransform.guides.persistence.spec": [
        (
            "What a guide is built from, also as plain data, and checks of a state dict before it is built.",
            "What a guide is built from.",
        ),
        (
            "What a guide is built from, a file holds, and a loaded guide is built from again.",
            "What a guide is built from.",
        ),
    ],
    "pyro_artransform.transforms.inversion": [
        (
            """    linearization = None if blocks is None else blocks.linearization()
    if linearization is not None:
        return _with_known_gradient(structured.family, linearization, y, (x, ladj))
""",
            "",
        ),
    ],
    "pyro_artransform.transforms.structure_check": [
        (
            """"coordinates themselves, so the log-determinant and the inverse are wrong. Use "
            "pyro_artransform.conditioners.MaskedMLP, or wrap the network in MaskedInput(net), which "
            "makes any network autoregressive"
""",
            """"coordinates themselves, so the log-determinant and the inverse are wrong. Use "
            "pyro_artransform.conditioners.MaskedMLP"
""",
        ),
    ],
    "pyro_artransform.conditioners.masks": [  # Python 3.10 has pairwise
        ("in pairwise([*units, adjacency]):", "in zip(units, [*units[1:], adjacency]):"),
        ("from itertools import pairwise\n", ""),
    ],
}
