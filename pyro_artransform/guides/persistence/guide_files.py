# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Files of guides: their specification as text, and their parameters."""

from collections.abc import Mapping
from typing import Any

from ..._base import files
from ..._base.files import FilePath
from .spec import GuideSpec, check_finite

_KIND = "a guide of class {}, format 9"


def save(guide: Any, path: FilePath) -> None:
    """See ``BaseGuide.save``."""
    spec = guide._checked_spec().to_json()
    guide._register()
    # an expanded tensor declares more elements than the file would hold
    state = {name: value.contiguous() for name, value in guide.state_dict().items()}
    check_finite(state)
    files.write(path, _KIND.format(type(guide).__name__), {"spec": spec, "state": state})


def load(
    cls: Any, path: FilePath, model: Any, map_location: Any, arguments: Mapping[str, Any]
) -> Any:
    """See ``BaseGuide.load``."""
    if held := arguments.keys() & {*cls._found_arguments}:
        raise ValueError(f"{held.pop()}: expected none, as the file holds those of the guide")
    saved = files.read(path, _KIND.format(cls.__name__), map_location)
    try:
        state = saved["state"]
        spec = GuideSpec.from_json(saved["spec"], next(iter(state.values())).device)
        known = {k: v for k, v in spec.arguments.items() if k not in cls._found_arguments}
        guide = cls((lambda: None) if model is None else model, **{**known, **arguments})
        guide._restore(spec, state)
    except Exception as error:
        wanted = "what the guide's save writes, and the guide's flow"
        raise ValueError(f"{path}: expected {wanted}, got: {error}") from error
    if model is None:
        guide._model = None
    return guide
