"""Variants as data: the named ones of each method, each a few changed settings, and those that a user writes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from unflaw.config import METHODS, Config, make_config


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
        chosen = own.pop("method", method)
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
_LEVELS = (
    ("level-1: features.levels=[1]", "the finest level alone"),
    ("level-2: features.levels=[2]", "the middle level alone"),
    ("level-3: features.levels=[3]", "the coarsest level alone"),
)
# By method, beside `FULL`: what is changed, and why.
_NAMED: dict[str, tuple[tuple[str, str], ...]] = {
    "uranet": (
        ("no-fasm: network.synthesis.clean=1.0", "nothing is altered: perception meets no anomaly"),
        (
            "fasm-textures: network.synthesis.others=0; network.synthesis.shuffles=0; network.synthesis.jitter=0",
            "the paper's source of anomalies alone",
        ),
        ("fasm-no-textures: network.synthesis.textures=0", "our sources of anomalies alone"),
        ("no-uncertainty: network.perception.bayesian=false", "a plain network: what is ambiguous is not marked"),
        ("plain-attention: network.restoration.masked=false", "self-attention to all, marked or not"),
        (
            "perceives-features: network.perception.input=features",
            "UIAPM sees F, as in the paper, not distances to the memory",
        ),
        ("no-memory: network.restoration.prototypes=0", "no prototypes of cells; UIAPM can see F only"),
        ("no-judge: network.restoration.coarse_prototypes=0", "without the memory of whole regions"),
        ("u-not-in-score: network.perception.in_score=false", "U marks cells for RAM, and judges no image"),
        (
            "paper-parts: network.restoration.prototypes=0; network.restoration.coarse_prototypes=0",
            "the paper's parts alone: no memory of any kind",
        ),
        ("untrained: training.steps=0", "the start of training: what it adds"),
        ("nearest_neighbor: method=nearest_neighbor", "distance to the memory alone, the floor"),
        *_LEVELS,
        ("levels-1-2: features.levels=[1, 2]", "without the coarsest level"),
        ("levels-1-3: features.levels=[1, 3]", "without the middle level"),
        ("levels-2-3: features.levels=[2, 3]", "without the finest level"),
        ("tau-u-0.3: network.perception.mean_threshold=0.3", "τ_U: more is marked as anomalous"),
        ("tau-u-0.7: network.perception.mean_threshold=0.7", "τ_U: less is marked as anomalous"),
        ("tau-v-0.1: network.perception.deviation_threshold=0.1", "τ_V: more is marked as ambiguous"),
        ("tau-v-0.4: network.perception.deviation_threshold=0.4", "τ_V: less is marked as ambiguous"),
        ("draws-2: network.perception.draws=2", "fewer weight samples"),
        ("draws-4: network.perception.draws=4", "fewer weight samples"),
        ("draws-16: network.perception.draws=16", "more weight samples"),
    ),
    "mfrnet": (
        ("k-1: network.k=[1]", "smaller mask cells"),
        ("k-4: network.k=[4]", "larger mask cells"),
        ("k-8: network.k=[8]", "larger mask cells"),
        ("k-2-4-8: network.k=[2, 4, 8]", "maps of several sizes of mask cells, averaged"),
        ("n-2: network.n=2", "fewer masks, each hides more"),
        ("n-4: network.n=4", "more masks, each hides less"),
        ("nothing-hidden: network.masked=false", "a plain autoencoder, which may copy"),
        ("no-memory: network.prototypes=0", "what is hidden is restored from its surroundings alone"),
        ("no-judge: network.coarse_prototypes=0", "without the memory of whole regions"),
        ("paper-parts: network.prototypes=0; network.coarse_prototypes=0", "the paper's parts alone"),
        ("nearest_neighbor: method=nearest_neighbor", "distance to the memory alone, the floor"),
        ("no-attention: network.attention=false", "blocks of convolution alone"),
        ("no-convolution: network.convolution=false", "blocks of attention alone"),
        ("l2-only: network.ssim=0; network.gms=0", "loss and map without structure"),
        ("ssim-only: network.pixel=0; network.gms=0", "loss and map of SSIM alone"),
        ("gms-only: network.pixel=0; network.ssim=0", "loss and map of gradients alone"),
        ("no-ssim: network.ssim=0", "loss and map without SSIM"),
        ("no-gms: network.gms=0", "loss and map without gradients"),
        *_LEVELS,
    ),
}


def named(method: str) -> tuple[Variant, ...]:
    """The variants of a method that have a name; `FULL` is the first, and for some methods the only one."""
    return FULL, *(parse(text, why) for text, why in _NAMED.get(method, ()))


def choose(method: str, only: Sequence[str] = (), own: Sequence[str] = ()) -> tuple[Variant, ...]:
    """The variants of an ablation: `FULL` always, the named ones or `only` some of them, and `own` ones for `parse`.

    Raises:
        ValueError: An unknown method or name, a name given twice, or a variant of another form.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; there are {', '.join(METHODS)}")
    known = named(method)
    names = [variant.name for variant in known]
    if unknown := [name for name in only if name not in names]:
        raise ValueError(f"{method} has no variant {unknown[0]!r}; there are {', '.join(names)}")
    chosen = [variant for variant in known if not only or variant.name in (FULL.name, *only)]
    for text in own:
        if text.strip() in names:
            raise ValueError(f"{text!r} is a variant that has a name; choose it with --only {text.strip()}")
        variant = parse(text)
        if variant.name in [other.name for other in chosen]:
            raise ValueError(f"two variants are called {variant.name!r}; give another name")
        chosen.append(variant)
    return tuple(chosen)
