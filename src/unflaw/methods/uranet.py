"""URA-Net (arXiv 2603.22840): uncertainty-integrated anomaly perception and restoration attention.

    F ──▶ FASM (training only) ──▶ F_a ──▶ UIAPM ──▶ U, V ──▶ M_U, M_final ──▶ RAM ──▶ F̂,   map = residual of F and F̂

The parts and their names are the paper's. Its hyper-parameters are not public to us: sizes, thresholds and losses are
our own, measured choices. Our reading of restoration "from global normal semantics": no place takes part in its own
restoration, marked or not, so that nothing can be copied (`RAM`).

Ours as well, each with a switch of its own:

* a memory of prototypes (`restoration.prototypes`): the distance to it is a second anomaly map, it and not the residual
  judges the image, and with `perception.input = "distance"` UIAPM sees it instead of F;
* a memory of whole regions (`restoration.regional_prototypes`), which joins map and score;
* a second restoration, of whole regions from what is far from them (`restoration.regional`), likewise: it serves where
  there is no memory;
* U in the image score (`perception.in_score`).

Why: docs/research.md.
"""

from __future__ import annotations

import math
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor, nn

from unflaw.config import Config, MethodOptions, Settings, WeightSource
from unflaw.features.extractor import FeatureExtractor
from unflaw.methods.base import DINO, LEVEL_VARIANTS, PAPER, Batch, Inspection, Method
from unflaw.methods.feature_set import NEW_IMAGES, Context, FeatureSet
from unflaw.methods.layers import BayesianConv2d, to_grid, to_tokens
from unflaw.methods.restoration_attention import RAM, Restoration
from unflaw.methods.synthesis import Anomalies, Synthesis, blend, perlin_masks, sources, synthesise
from unflaw.methods.visualization import Row, Stage, Stages

SUREST = math.log(1e6 - 1)  # logit that counts at most


class Perception(Settings):
    """UIAPM: the Bayesian network that marks anomalous regions and ambiguous boundaries."""

    width: int = Field(32, ge=1, le=8192)
    depth: int = Field(2, ge=1, le=64, description="hidden Bayesian convolutions of 3×3")
    draws: int = Field(8, ge=1, le=1024, description="weight samples S at inspection")
    prior: float = Field(0.1, gt=0, description="standard deviation of the Gaussian prior over weights")
    kl_weight: float = Field(1.0, ge=0, description="weight of KL / N")
    bayesian: bool = Field(True, description="False: plain convolutions, no uncertainty map, M_final = M_U")
    input: Literal["distance", "features"] = Field(
        "distance", description="what it sees: distances of F to the memory, where there is one, or F itself"
    )
    in_score: bool = Field(True, description="U takes part in the image score")
    mean_threshold: float = Field(0.5, ge=0, le=1, description="τ_U: M_U = [U ≥ τ_U]")
    deviation_threshold: float = Field(0.2, ge=0, description="τ_V: M_final = M_U ∨ [V ≥ τ_V]")


class URANetOptions(MethodOptions):
    """URA-Net (arXiv 2603.22840)."""

    method: Literal["uranet"] = "uranet"
    synthesis: Synthesis = Synthesis()
    perception: Perception = Perception()
    restoration: Restoration = Restoration()


class UIAPM(nn.Module):
    """Uncertainty-integrated anomaly perception: a Bayesian network from F to the probability of an anomaly.

    With a memory it sees how far F is from normal instead (`URANet`). One plain 1×1 convolution comes first; Bayesian
    3×3 convolutions and a Bayesian 1×1 head follow, so that the S weight samples share it.
    """

    def __init__(self, channels: int, options: Perception) -> None:
        super().__init__()
        self.options = options
        width, depth = options.width, options.depth
        kernels = [(width, width, 3)] * depth + [(width, 1, 1)]
        self.narrow = nn.Conv2d(channels, width, 1)
        self.layers = nn.ModuleList(
            BayesianConv2d(a, b, k, options.draws, options.prior, options.bayesian) for a, b, k in kernels
        )
        nn.init.constant_(self.bayesian_layers()[-1].bias, -3.0)  # anomalies are rare

        self.thresholds: Tensor
        self.register_buffer("thresholds", torch.tensor([options.mean_threshold, options.deviation_threshold]))

    def fit_thresholds(self, mean: Tensor, deviation: Tensor) -> None:
        """Raises τ_U and τ_V to the 99.99th percentile of U and V of good images, where that is higher (ours)."""
        found = torch.stack([m.flatten().sort().values[int(0.9999 * (m.numel() - 1))] for m in (mean, deviation)])
        asked = torch.tensor([self.options.mean_threshold, self.options.deviation_threshold])
        self.thresholds.copy_(torch.maximum(asked, found))

    def bayesian_layers(self) -> list[BayesianConv2d]:
        return [layer for layer in self.layers if isinstance(layer, BayesianConv2d)]

    def sample(self, features: Tensor, rng: Generator) -> Tensor:
        """F (N, C, g, g) → logits (N, 1, g, g) of one draw per activation, for training."""
        x = self.narrow(features)
        for layer in self.bayesian_layers():
            x = layer.sample(F.relu(x), rng)
        return x

    def draws(self, features: Tensor) -> Tensor:
        """F (N, C, g, g) → logits (N, S, g, g) of the frozen draws; one draw if not Bayesian.

        Images one by one: convolutions round differently in other batches, and U counts in its deviations on good
        images, which may be small.
        """
        narrow, found = self.narrow(features), []
        for x in (narrow,) if torch.compiler.is_exporting() else narrow.split(1):
            for layer in self.bayesian_layers():
                x = layer(F.relu(x))  # noqa: PLW2901
            found.append(x)
        return torch.cat(found)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """F (N, C, g, g) → mean map U and uncertainty map V, both (N, 1, g, g): mean and deviation of S draws."""
        return self.moments(self.draws(features))

    def moments(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """U and V from `draws`."""
        draws = logits.sigmoid()
        deviation = draws.std(1, keepdim=True) if draws.shape[1] > 1 else torch.zeros_like(draws)
        return draws.mean(1, keepdim=True), deviation

    def masks(self, mean: Tensor, deviation: Tensor) -> tuple[Tensor, Tensor]:
        """M_U = [U ≥ τ_U] and M_final = M_U ∨ [V ≥ τ_V], as 0 or 1."""
        marked, ambiguous = mean >= self.thresholds[0], deviation >= self.thresholds[1]
        return marked.float(), (marked | ambiguous).float()

    def loss(self, logits: Tensor, mask: Tensor, n_images: int) -> dict[str, Tensor]:
        """BCE + Dice against M, and KL / N (our reading of the loss). Dice is of all images together."""
        bce = F.binary_cross_entropy_with_logits(logits, mask)
        p = logits.sigmoid()
        dice = 1 - (2 * (p * mask).sum() + 1) / (p.sum() + mask.sum() + 1)
        cells = n_images * mask[0].numel()
        kl = sum((layer.kl() for layer in self.bayesian_layers()), torch.zeros(())) * self.options.kl_weight / cells
        return {"perception": bce + 0.5 * dice, "kl": kl}


# The method without our memories
RESTORATION: dict[str, Any] = {
    "network.restoration.prototypes": 0,
    "network.restoration.regional_prototypes": 0,
}


CPU: dict[str, Any] = {"training.steps": 200, "training.batch": 8, "training.learning_rate": 1e-3}


class URANet(Method):
    """Assembly; see the module."""

    options_class = URANetOptions
    options: URANetOptions
    normalization_buffers = (*Method.normalization_buffers, "perception.thresholds")
    profiles = {  # noqa: RUF012
        "cpu": CPU,
        "dino": CPU | DINO,
        "restoration": RESTORATION
        | {
            "network.restoration.regional": True,
            "training.steps": 1500,
            "training.batch": 8,
            "training.learning_rate": 2e-3,
        },
        "paper": PAPER
        | RESTORATION
        | {
            "network.restoration.token_width": 384,
            "network.restoration.width": 768,
            "network.restoration.depth": 8,
            "network.restoration.heads": 12,
            "network.restoration.patch": 4,
            "network.perception.width": 256,
            "network.perception.draws": 16,
        },
    }
    variants = (
        ("no-fasm: network.synthesis.clean=1.0", "nothing is altered: perception meets no anomaly"),
        (
            "fasm-textures: network.synthesis.others=0; network.synthesis.shuffles=0; network.synthesis.jitter=0",
            "the paper's source of anomalies alone",
        ),
        ("fasm-no-textures: network.synthesis.textures=0", "our sources of anomalies alone"),
        ("no-uncertainty: network.perception.bayesian=false", "a plain network: what is ambiguous is not marked"),
        ("plain-attention: network.restoration.masked=false", "attention to marked tokens as well"),
        (
            "sees-itself: network.restoration.gap=0; network.restoration.regional_gap=0",
            "a place may be copied to itself",
        ),
        ("gap-1: network.restoration.gap=1", "a place is restored from its neighbours, too"),
        ("gap-3: network.restoration.gap=3", "a place is restored from farther away"),
        ("no-attention: network.restoration.depth=0", "restoration by a convolution of the surroundings alone"),
        ("regional-restoration: network.restoration.regional=true", "with the restoration of whole regions"),
        (
            "perceives-features: network.perception.input=features",
            "UIAPM sees F, as in the paper, not distances to the memory",
        ),
        ("no-memory: network.restoration.prototypes=0", "no memory of cells; UIAPM can see F only"),
        ("no-regional-memory: network.restoration.regional_prototypes=0", "without the memory of whole regions"),
        (
            "u-not-in-score: network.perception.in_score=false",
            "U marks cells, and is not part of the image score",
        ),
        (
            "paper-parts: network.restoration.prototypes=0; network.restoration.regional_prototypes=0",
            "the paper's parts alone: no memory of any kind",
        ),
        ("untrained: training.steps=0", "the start of training: what it adds"),
        ("nearest_neighbor: method=nearest_neighbor", "distance to the memory alone, the floor"),
        *LEVEL_VARIANTS,
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
    )

    def __init__(self, config: Config, weights: WeightSource = None) -> None:
        options = config.network
        assert isinstance(options, URANetOptions)
        sizes = options.restoration
        super().__init__(
            config,
            weights,
            n_maps=1 + (sizes.prototypes > 0),  # residual and, with a memory, distance to it
            n_regional=int(sizes.regional),
            has_perceived=options.perception.in_score,
            prototypes=sizes.prototypes,
            regional_prototypes=sizes.regional_prototypes,
        )
        if sizes.prototypes:
            self.scored_maps = slice(1, 2)  # the residual shows where; the distance tells better whether
        self.uses_textures = options.synthesis.textures > 0
        self.weight_samples = options.perception.draws if options.perception.bayesian else 1
        channels, shape = self.features.channels, self.features.shape
        self.sees_distance = sizes.prototypes > 0 and options.perception.input == "distance"
        self.perception = UIAPM(2 if self.sees_distance else channels, options.perception)
        self.restoration = RAM(channels, shape, sizes, sizes.patch, sizes.gap)
        self.regional_restoration = None
        if sizes.regional:
            regional, halves = cast(FeatureExtractor, self.features).regional_channels, [-(-n // 2) for n in shape]
            self.regional_restoration = RAM(regional, (halves[0], halves[1]), sizes, 1, sizes.regional_gap)
        self.textures: Tensor | None = None
        self.n_images = 1

    def fit_memory(self, data: FeatureSet, rng: Generator) -> Batch:
        self.textures, self.n_images = data.textures, len(data.features)
        for layer in self.perception.bayesian_layers():
            layer.freeze(rng)
        self.restoration.fit(data.features)
        if self.regional_restoration is not None:
            self.regional_restoration.fit(torch.cat([self._regions(part) for part in data.features.split(16)]))
        super().fit_memory(data, rng)
        if self.memory is None or not self.sees_distance:
            return {}
        return self.memory.retrieve_cached(data.features, self.config.training.cache_gb * 2**30)

    def loss(self, batch: Batch, rng: Generator) -> dict[str, Tensor]:
        """FASM on F; UIAPM against M; RAM from F_a, attention from what M leaves of it, against F."""
        clean = batch["features"]
        anomalies = synthesise(clean, self.textures, self.options.synthesis, rng)
        logits = self.perception.sample(self._perceived_input(anomalies, batch), rng)
        terms = self.perception.loss(logits, anomalies.mask, self.n_images)
        terms["restoration"] = relative_error(self.restoration(anomalies.features, anomalies.mask), clean)
        if self.regional_restoration is not None:
            restored = self.regional_restoration(self._regions(anomalies.features), _coarser(anomalies.mask))
            terms["regional_restoration"] = relative_error(restored, self._regions(clean))
        terms["loss"] = sum(terms.values(), torch.zeros(()))
        return terms

    def forward(self, features: Tensor, context: Context = NEW_IMAGES) -> Inspection:
        distances, inputs = [], [features]
        if self.memory is not None:
            retrieved, distance, extended, scored = self.memory(features, context)
            distances = [scored]
            if self.sees_distance:
                retrieval_residual = length(features - retrieved)
                # prototypes added after calibration may lower the score of an image, never raise it
                inputs = [self._distances(d, retrieval_residual, context.training_rows) for d in (distance, extended)]
        logits = self.perception.draws(inputs[0])
        mean, deviation = self.perception.moments(logits)
        final = self.perception.masks(mean, deviation)[1]
        restored = self.restoration(features, final)
        perceived = None
        if self.has_perceived:
            perceived = mean_logit(logits)
            for extended_input in inputs[1:]:
                perceived = torch.minimum(perceived, mean_logit(self.perception.draws(extended_input)))
        return Inspection(
            torch.cat([length(features - restored), *distances], dim=1),
            perceived,
            self.regional_maps(features, context, final),
            restored,
            {"mean": mean, "uncertainty": deviation, "mask": final},
        )

    def regional_maps(self, features: Tensor, context: Context, marked: Tensor) -> Tensor | None:
        """Residual of the restoration of regions, and distance to the memory of them: (N, 0 to 2, ⌈g/2⌉, ⌈g/2⌉)."""
        maps = []
        if self.regional_restoration is not None:
            regions = self._regions(features)
            maps.append(length(regions - self.regional_restoration(regions, _coarser(marked))))
        if (distance := self.regional_distance(features, context)) is not None:
            maps.append(distance)
        return torch.cat(maps, dim=1) if maps else None

    def _regions(self, features: Tensor) -> Tensor:
        return cast(FeatureExtractor, self.features).to_regions(features.float())

    def visualize(self, features: Tensor, inspection: Inspection) -> Stages:
        """Perception: the maps of UIAPM. Restoration: the features that RAM sees and restores, and all anomaly maps."""
        assert inspection.restored is not None
        mean, deviation, final = (inspection.layers[name] for name in ("mean", "uncertainty", "mask"))
        perception = {
            "U, mean map": Stage("share", mean[0]),
            "V, uncertainty": Stage("map", deviation[0]),
            "M_U, anomalous": Stage("mask", self.perception.masks(mean, deviation)[0][0]),
            "M_final": Stage("mask", final[0]),
        }
        restoration = {"Features, drawn": Stage("features", features[0])}
        restoration["Restored, drawn"] = Stage("features", inspection.restored[0])
        restoration["Residual"] = Stage("map", inspection.anomaly_maps[0, :1])
        if self.memory is not None:
            restoration["Distance to the memory"] = Stage("map", inspection.anomaly_maps[0, 1:])
        regional = iter(() if inspection.regional is None else inspection.regional[0, :, None].unbind())
        if self.regional_restoration is not None:
            restoration["Regional residual"] = Stage("map", next(regional))
        if self.regional_memory is not None:
            restoration["Regional distance"] = Stage("map", next(regional))
        return {"perception": [("", perception)], "restoration": [("", restoration)]}

    def visualize_training(self, images: Tensor, textures: Tensor | None, rng: Generator) -> Stages:
        """FASM, a row for each source of foreign features: both ends of the range of β, and U of UIAPM.

        Foreign features are shown by the cells of the images that they come from; jitter comes from none.
        """
        options, shape = self.options.synthesis, self.features.shape
        bank = None if textures is None else self.embed(textures)
        bank_cells = None if textures is None else _cells(textures, shape)
        clean, cells = self.embed(images), _cells(images, shape)
        made = sources(clean, bank, 1, rng)
        names = [n for n in ("textures", "others", "shuffles", "jitter") if n in made and getattr(options, n)]
        rows: list[Row] = []
        for row, name in enumerate(names):
            i, seed = row % len(clean), int(torch.randint(2**31, (1,), generator=rng))
            foreign, shown = (  # the same draw of features and of the images that these were made from
                sources(grid, others, 1, Generator().manual_seed(seed))[name]()[i]
                for grid, others in ((clean, bank), (cells, bank_cells))
            )
            mask = perlin_masks(1, shape, options, rng)[0]
            tiles = {"Good image": Stage("image", images[i]), "Mask M, the label": Stage("mask", mask)}
            if name != "jitter":
                tiles["Foreign T, its source"] = Stage("image", F.pixel_shuffle(shown, math.isqrt(len(shown) // 3)))
            for beta in options.strength:
                altered = blend(clean[i : i + 1], foreign, mask, beta)
                tiles[f"beta {beta:g}: altered, drawn"] = Stage("features", altered[0])
                tiles[f"beta {beta:g}: distance from clean"] = Stage("map", length(altered - clean[i])[0])
                tiles[f"beta {beta:g}: U of UIAPM"] = Stage("share", self(altered).layers["mean"][0])
            rows.append((name, tiles))
        farthest = max((float(t.values.max()) for _, row in rows for t in row.values() if t.kind == "map"), default=0)
        return {"fasm": [(name, {h: t._replace(limit=farthest) for h, t in row.items()}) for name, row in rows]}

    def _distances(self, distance: Tensor, retrieval_residual: Tensor, training_rows: Tensor | None = None) -> Tensor:
        """Input of UIAPM where there is a memory (ours), (N, 2, g, g): distances in units of the usual one, less 1.

        From F itself UIAPM learns to recognise artificial anomalies and not real ones; how far F is from normal means
        the same for both.

        Args:
            distance: Of F to the nearest prototype, (N, 1, g, g).
            retrieval_residual: Distance of F to the retrieved features, likewise.
            training_rows: As in `Context`.
        """
        assert self.memory is not None
        return torch.cat([distance, retrieval_residual], dim=1) / self.memory.unit(training_rows) - 1

    def _perceived_input(self, anomalies: Anomalies, batch: Batch) -> Tensor:
        """Input of UIAPM for F_a. Only altered cells are retrieved anew, without the images that they are made of."""
        if self.memory is None or not self.sees_distance:
            return anomalies.features
        rows = batch["row"].long().cpu()
        seen = self._distances(batch["distance"], length(batch["features"] - batch["retrieved"]), rows)
        tokens = to_tokens(anomalies.features).flatten(0, 1)
        altered = anomalies.mask.flatten().nonzero()[:, 0]
        made_of = torch.stack([rows, rows[anomalies.origin]], dim=1)
        of = altered.cpu() // (len(tokens) // len(rows))
        with torch.no_grad():
            mixture, distance, *_ = self.memory.retrieve(tokens[altered], made_of[of])
        retrieval_residual = (tokens[altered] - mixture).norm(dim=1)
        anew = self._distances(distance.view(-1, 1, 1, 1), retrieval_residual.view(-1, 1, 1, 1), rows[of]).flatten(1)
        tokens = to_tokens(seen).flatten(0, 1).index_copy(0, altered, anew.to(seen)).view(len(seen), -1, 2)
        return to_grid(tokens, seen.shape[2:])

    @torch.no_grad()
    def fit_normalization(self, features: Tensor, context: Context) -> None:
        """Also raises τ_U and τ_V so far that hardly any cell of good training images is marked."""
        layers = self._inspected(features, context).layers
        mean, deviation = (layers[name][:, 0] for name in ("mean", "uncertainty"))
        inside = torch.ones_like(mean, dtype=torch.bool) if context.valid is None else context.valid
        self.perception.fit_thresholds(mean[inside], deviation[inside])
        super().fit_normalization(features, context)


def relative_error(restored: Tensor, clean: Tensor) -> Tensor:
    """Mean squared error of F̂ over the mean square of F, both (N, C, g, g)."""
    return (restored.float() - clean).square().sum(1).mean() / clean.square().sum(1).mean()


def _coarser(marked: Tensor) -> Tensor:
    """Marks of regions: any of their cells, (N, 1, g, g) → (N, 1, ⌈g/2⌉, ⌈g/2⌉)."""
    return F.max_pool2d(marked, 2, ceil_mode=True)


def _cells(images: Tensor, shape: tuple[int, int]) -> Tensor:
    """Images (N, 3, H, W) as a grid whose cells hold their pixels, (N, 3·m², *shape); m about H / rows."""
    m = max(1, images.shape[-2] // shape[0])
    return F.pixel_unshuffle(F.interpolate(images, (m * shape[0], m * shape[1]), mode="bilinear"), m)


def mean_logit(logits: Tensor) -> Tensor:
    """Logits (N, S, g, g) → the logit of their mean probability, (N, 1, g, g), within ±13.8: one in a million.

    In logarithms throughout: rounding would leave nothing of a probability near 0, and differently in every runtime.
    """
    rest = (-logits.abs()).exp().log1p()  # log σ(x) = min(x, 0) − rest; runtimes may compute log(σ(x)), which is coarse
    likely, unlikely = ((x.clamp_max(0) - rest).logsumexp(1, keepdim=True) for x in (logits, -logits))
    return (likely - unlikely).clamp(-SUREST, SUREST)


def length(features: Tensor) -> Tensor:
    """(N, C, g, g) → Euclidean norm over channels, (N, 1, g, g)."""
    return features.square().sum(1, keepdim=True).sqrt()
