"""Variants as data: the named ones of each method, each a few changed settings, and those that a user writes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from unflaw import registry
from unflaw.config import Config, make_config


@dataclass(frozen=True)
class Variant:
    """A method with a few settings changed.

    Attributes:
        name: Name in tables.
        changes: Dotted settings; "method" chooses another method.
        why: Reason to run it.
    """

    name: str
    changes: dict[str, Any]
    why: str = ""

    @property
    def overrides(self) -> str:
        """The changes as `setting=value; setting=value`, which `parse` reads."""
        return written(self.changes)

    def config(self, method: str, common: dict[str, Any], seed: int, profile: str = "cpu") -> Config:
        """The configuration of a run.

        Args:
            method: The method that the variant is of.
            common: Settings of all variants; those of the network are left out where the variant is another method.
            seed: Seed of the run.
            profile: "cpu" or "paper".

        Raises:
            ValueError: A setting that is unknown or out of range; the message names variant and setting.
        """
        own = dict(self.changes)
        chosen = registry.canonical(own.pop("method", method))
        shared = {name: v for name, v in common.items() if chosen == method or not name.startswith("network.")}
        settings = shared | own
        try:
            if "training.seed" in settings:
                raise ValueError("setting training.seed: every run has its own; --seeds says how many")
            return make_config(chosen, profile, settings | {"training.seed": seed})
        except ValueError as error:
            raise ValueError(f"variant {self.name!r}: {error}") from error


def written(changes: dict[str, Any]) -> str:
    """Dotted settings as `setting=value; setting=value`."""
    values = {name: value if isinstance(value, str) else json.dumps(value) for name, value in changes.items()}
    return "; ".join(f"{name}={value}" for name, value in values.items())


def parse(text: str, why: str = "") -> Variant:
    """A variant from `name: setting=value; setting=value`.

    Raises:
        ValueError: Another form.
    """
    name, colon, rest = text.partition(":")
    parts = [part.strip().partition("=") for part in rest.split(";") if part.strip()]
    if not (name.strip() and colon and all(setting.strip() and equals for setting, equals, _ in parts)):
        raise ValueError(f"variant {text!r} is not of the form 'name: setting=value; setting=value'")
    return Variant(name.strip(), {setting.strip(): _value(value.strip()) for setting, _, value in parts}, why)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


FULL = Variant("full", {}, "the method as it is")


def named(method: str) -> tuple[Variant, ...]:
    """The variants of a method that have a name; `FULL` is the first, and for some methods the only one."""
    return FULL, *(parse(text, why) for text, why in registry.method_class(method).variants)


def choose(method: str, only: Sequence[str] = (), own: Sequence[str] = ()) -> tuple[Variant, ...]:
    """The variants of an ablation: `FULL` always, the named ones or `only` some of them, and `own` ones for `parse`.

    Raises:
        ValueError: An unknown method or name, a name given twice, or a variant of another form.
    """
    known = named(method)
    names = [variant.name for variant in known]
    if unknown := [name for name in only if name not in names]:
        raise ValueError(f"{method} has no variant {unknown[0]!r}; there are {', '.join(names)}")
    chosen = [variant for variant in known if not only or variant.name in (FULL.name, *only)]
    for text in own:
        if text.strip() in names:
            raise ValueError(f"{text!r} is a variant that has a name; choose it with --only {text.strip()}")
        variant = parse(text)
        try:
            registry.method_class(variant.changes.get("method", method))
        except ValueError as error:
            raise ValueError(f"variant {variant.name!r}: {error}") from error
        if variant.name in [other.name for other in chosen]:
            raise ValueError(f"two variants are called {variant.name!r}; give another name")
        chosen.append(variant)
    return tuple(chosen)
