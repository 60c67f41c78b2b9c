# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Saves results to files of tensors and plain data."""

from typing import Any, ClassVar, TypeVar

from torch import Tensor

from .._base import files
from .._base.files import FilePath
from ..model.symmetries import Symmetry
from .checks import Check, FailedCheck, Verdict
from .convergence import ModeShares
from .importance_sampling import Importance
from .marginals import Marginals
from .plates import ConditionalDiagnostics, PlateDiagnostics

_KIND = "the draws and the verdict of class {}, format 1"
_LEFT_OUT = ("model", "guide")
# a pair always encodes an object by class and content; tuples, too, are encoded as such a pair
_CLASSES: dict[str, Any] = {
    each.__name__: each
    for each in (
        ConditionalDiagnostics,
        Importance,
        Marginals,
        ModeShares,
        PlateDiagnostics,
        Verdict,
        FailedCheck,
        Symmetry,
    )
}

Result = TypeVar("Result", bound="SavedResult")


class SavedResult:
    """A dataclass that can be saved, apart from its model and its guide."""

    with_model: ClassVar[Any]

    def __init_subclass__(cls) -> None:
        _CLASSES[cls.__name__] = cls

    def save(self, path: FilePath) -> None:
        """Writes draws, numbers and the verdict to a file of tensors and plain data.

        The file holds neither the model nor the guide, which has its own ``save``. If writing fails, an
        existing file is kept.
        """
        content = {"format": _KIND.format(type(self).__name__), "result": _plain(self)}
        files.save(path, content)

    @classmethod
    def load(
        cls: type[Result], path: FilePath, model: Any = None, *, map_location: Any = None
    ) -> Result:
        """Reads a file written by :meth:`save`, without running code from it.

        :param model: the model, needed for predictions.
        :param map_location: as for ``torch.load``.
        :raises ValueError: if the file was not written by :meth:`save` of this class, or is damaged.
        """
        saved = files.read(path, _KIND.format(cls.__name__), map_location)
        try:
            result = _restored(saved["result"])
            if type(result) is not cls:
                raise TypeError(f"a {type(result).__name__}")
            loaded: Result = result.with_model(model)
            return loaded
        except Exception as error:
            raise ValueError(
                f"{path}: expected a file written by {cls.__name__}.save, got: {error}"
            ) from None


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        # an expanded tensor would declare more numbers than the file holds
        return value.detach().contiguous()
    if isinstance(value, Check):
        return "Check", value.name
    if (kind := type(value).__name__) in _CLASSES:
        names = getattr(value, "__dataclass_fields__", None) or value._fields
        return kind, {k: _plain(getattr(value, k)) for k in names if k not in _LEFT_OUT}
    if isinstance(value, tuple):
        return "tuple", [*map(_plain, value)]
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return value


def _restored(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _restored(each) for name, each in value.items()}
    if not isinstance(value, tuple):
        return value
    name, content = value
    if name == "tuple":
        return tuple(map(_restored, content))
    return Check[content] if name == "Check" else _CLASSES[name](**_restored(content))
