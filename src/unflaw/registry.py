"""Methods by name. Importing this module imports neither torch nor any method.

A method is one file and one registration. Methods of this package are registered in `_BUILT_IN`, those of other
packages by an entry point of the group "unflaw.methods", and those of a script by the decorator `register`.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from unflaw.methods.base import Method

GROUP = "unflaw.methods"  # of entry points
_BUILT_IN = {
    "uranet": "unflaw.methods.uranet:URANet",
    "nearest_neighbor": "unflaw.methods.nearest:NearestNeighbor",
    "mfrnet": "unflaw.methods.mfrnet:MFRNet",
    "draem": "unflaw.methods.draem:DRAEM",
    "memae": "unflaw.methods.memae:MemAE",
}
_ALIASES = {"lookup": "nearest_neighbor"}
_registered: dict[str, type[Method]] = {}

M = TypeVar("M", bound="type[Method]")


def register(method: M) -> M:
    """Class decorator that registers a method under the default of `method` in its `options_class`.

    Raises:
        ValueError: The options have no such default, or the name is one of a built-in method.
    """
    name = _name_of(method)
    if not (isinstance(name, str) and name) or name in (*_BUILT_IN, *_ALIASES):
        raise ValueError(
            f"{method.__name__}.options_class needs a name of its own, such as "
            f'`method: Literal["{method.__name__.lower()}"] = "{method.__name__.lower()}"`; it has {name!r}'
        )
    _registered[name] = method
    return method


def _name_of(method: type[Method]) -> object:
    """The default of `method` in the options of a method; None where it has none."""
    options = getattr(method, "options_class", None)
    return None if options is None else options.model_fields["method"].default


def names() -> tuple[str, ...]:
    """Returns the names of all methods: built-in ones, those of installed packages, registered ones."""
    return tuple(dict.fromkeys([*_BUILT_IN, *(found.name for found in entry_points(group=GROUP)), *_registered]))


def canonical(name: str) -> str:
    """Returns the name that a method has in configurations and records: an alias is replaced."""
    return _ALIASES.get(name, name)


def method_class(name: str) -> type[Method]:
    """Imports the module of a method and returns its class.

    Raises:
        ValueError: No method has this name.
    """
    name = canonical(name)
    if name in _registered:
        return _registered[name]
    if name in _BUILT_IN:
        module, _, attribute = _BUILT_IN[name].partition(":")
        found: type[Method] = getattr(import_module(module), attribute)
        return found
    for entry in entry_points(group=GROUP):
        if entry.name == name:
            try:
                loaded: type[Method] = entry.load()
            except (ImportError, AttributeError) as error:
                raise ValueError(
                    f"method {name!r}: its package cannot be imported ({error}); install it again"
                ) from error
            if _name_of(loaded) != name:
                raise ValueError(
                    f"method {name!r}: the entry point of its package has this name, and its options the name "
                    f"{_name_of(loaded)!r}; make them equal"
                )
            return loaded
    raise ValueError(
        f"unknown method {name!r}; there are {', '.join(names())} (the package of another one has to be installed)"
    )
