"""URA-Net (arXiv 2603.22840): uncertainty-integrated anomaly perception and restoration attention.

    F ──▶ FASM (training only) ──▶ F_a ──▶ UIAPM ──▶ U, V ──▶ M_U, M_final ──▶ RAM ──▶ F̂,   map = residual of F and F̂

The parts and their names are the paper's. Its hyper-parameters are not public to us: sizes, thresholds and losses are
our own, measured choices. Ours as well, each with a switch of its own:

* a memory of prototypes (`restoration.prototypes`): RAM restores from features retrieved there, and the distance to it
  is a second anomaly map; with `perception.input = "distance"` UIAPM sees distances to it instead of F;
* a second memory of whole regions (`restoration.regional_prototypes`), which joins map and score;
* U in the image score (`perception.in_score`).

Without the first, F̂ is what RAM's network predicts and nothing else. Why: docs/research.md.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Generator, Tensor, nn

from unflaw.config import Config, MethodOptions, Settings, WeightSource
from unflaw.methods.base import LEVEL_VARIANTS, PAPER, Batch, Inspection, Method
from unflaw.methods.feature_set import NEW_IMAGES, Context, FeatureSet
from unflaw.methods.layers import AttentionBlock, BayesianConv2d, sincos_positions, to_grid, to_tokens
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


class Restoration(Settings):
    """RAM: restoration attention."""

    patch: int = Field(2, ge=1, le=256, description="side of a token in feature cells")
    width: int = Field(192, ge=4, le=8192, multiple_of=4)
    depth: int = Field(3, ge=0, le=64)
    heads: int = Field(3, ge=1, le=1024)
    masked: bool = Field(True, description="keys only where M_final marks nothing; False: plain self-attention")
    prototypes: int = Field(
        4096, ge=0, le=10_000_000, description="memory of normal tokens across images; 0: the image alone"
    )
    regional_prototypes: int = Field(
        16384, ge=0, le=10_000_000, description="size of the memory of whole regions, for image score and map; 0: none"
    )
    sharpness: float = Field(2.0, gt=0, description="softmax(−sharpness·d²/radius²) over the nearest prototypes")

    @model_validator(mode="after")
    def _heads_fit(self) -> Restoration:
        if self.width % self.heads:
            raise ValueError(f"the width of {self.width} cannot be cut into {self.heads} heads; choose a divisor")
        return self


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
        """F (N, C, g, g) → logits (N, S, g, g) of the frozen draws; one draw if not Bayesian."""
        x = self.narrow(features)
        for layer in self.bayesian_layers():
            x = layer(F.relu(x))
        return x

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


class RAM(nn.Module):
    """Restoration attention: F̂ from what is unmarked in the image and from the memory of normal tokens.

    1. Attention to the prototypes turns each token into a mixture of normal ones (`MemoryBank`). It is not trained:
       a soft nearest-neighbor search. Only this mixture goes on, so an anomaly cannot be copied through.
    2. Marked tokens become a learned mask token.
    3. A transformer over p×p patches, keys restricted to unmarked ones, predicts from context what the mixture lacks.

    Without prototypes step 1 is left out, as in the paper, and step 3 predicts all of F: no cell of F is passed on as
    it is, marked or not. A path around the network would copy every anomaly that nothing marks.

    Args:
        channels: C.
        grid: g.
        options: Sizes and switches.
    """

    def __init__(self, channels: int, grid: int, options: Restoration) -> None:
        super().__init__()
        self.options = options
        p, width = options.patch, options.width
        if grid % p:
            raise ValueError(f"the grid of {grid} cells cannot be cut into patches of {p}; choose a divisor")
        self.narrow = nn.Conv2d(channels, width, p, p)
        self.mask_token = nn.Parameter(0.02 * torch.randn(width))
        self.positions: Tensor
        self.register_buffer("positions", sincos_positions(grid // p, width), persistent=False)
        self.blocks = nn.ModuleList(AttentionBlock(width, options.heads) for _ in range(options.depth))
        self.norm = nn.LayerNorm(width)
        self.widen = nn.Linear(width, channels * p * p)
        nn.init.zeros_(
            self.widen.weight
        )  # training starts at the retrieved features, or at the mean of F, and corrects it
        nn.init.zeros_(self.widen.bias)

    def forward(self, seen: Tensor, marked: Tensor) -> Tensor:
        """Steps 2 and 3: retrieved features (else F) (N, C, g, g), marks (N, 1, g, g) in {0, 1} → F̂."""
        p = self.options.patch
        hidden = F.max_pool2d(marked, p)  # (N, 1, side, side): a patch is marked if any of its cells is
        flat = hidden.flatten(1)[..., None]
        x = self.narrow(seen).flatten(2).transpose(1, 2)  # (N, T, width)
        x = x * (1 - flat) + self.mask_token * flat + self.positions
        allowed = None
        if self.options.masked:
            unmarked = flat[..., 0] == 0
            unmarked = unmarked | ~unmarked.any(1, keepdim=True)  # all marked: attend to all rather than to nothing
            allowed = unmarked[:, None, None, :]
        for block in self.blocks:
            x = block(x, allowed)
        predicted = F.pixel_shuffle(to_grid(self.widen(self.norm(x))), p)
        if not self.options.prototypes:
            return predicted
        return seen * (1 - F.interpolate(hidden, scale_factor=p)) + predicted


class URANet(Method):
    """Assembly; see the module."""

    options_class = URANetOptions
    options: URANetOptions
    normalization_buffers = (*Method.normalization_buffers, "perception.thresholds")
    profiles = {  # noqa: RUF012
        "cpu": {"training.batch": 8},
        "paper": PAPER
        | {
            "network.restoration.width": 768,
            "network.restoration.depth": 8,
            "network.restoration.heads": 12,
            "network.restoration.patch": 4,
            "network.restoration.prototypes": 0,
            "network.restoration.regional_prototypes": 0,
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
        ("plain-attention: network.restoration.masked=false", "self-attention to all, marked or not"),
        (
            "perceives-features: network.perception.input=features",
            "UIAPM sees F, as in the paper, not distances to the memory",
        ),
        ("no-memory: network.restoration.prototypes=0", "no prototypes of cells; UIAPM can see F only"),
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
        prototypes = options.restoration.prototypes
        super().__init__(
            config,
            weights,
            n_maps=2 if prototypes else 1,  # residual and, with a memory, distance to it
            has_perceived=options.perception.in_score,
            prototypes=prototypes,
            regional_prototypes=options.restoration.regional_prototypes,
        )
        self.uses_textures = options.synthesis.textures > 0
        self.weight_samples = options.perception.draws if options.perception.bayesian else 1
        if self.memory is not None:
            self.memory.sharpness = options.restoration.sharpness
        channels = self.features.channels
        self.sees_distance = prototypes > 0 and options.perception.input == "distance"
        self.perception = UIAPM(2 if self.sees_distance else channels, options.perception)
        self.restoration = RAM(channels, config.features.grid, options.restoration)
        self.textures: Tensor | None = None
        self.n_images = 1

    def fit_memory(self, data: FeatureSet, rng: Generator) -> Batch:
        self.textures, self.n_images = data.textures, len(data.features)
        for layer in self.perception.bayesian_layers():
            layer.freeze(rng)
        super().fit_memory(data, rng)
        if self.memory is None:
            return {}
        return self.memory.retrieve_cached(data.features, self.config.training.cache_gb * 2**30)

    def loss(self, batch: Batch, rng: Generator) -> dict[str, Tensor]:
        """FASM on F; UIAPM against M; RAM from what M leaves of the retrieved features, against the clean F."""
        clean = batch["features"]
        anomalies = synthesise(clean, self.textures, self.options.synthesis, rng)
        logits = self.perception.sample(self._perceived_input(anomalies, batch), rng)
        terms = self.perception.loss(logits, anomalies.mask, self.n_images)
        # altered cells are the marked ones, which become mask tokens: retrieval for F serves for that for F_a
        restored = self.restoration(batch.get("retrieved", anomalies.features), anomalies.mask)
        terms["restoration"] = (restored - clean).square().sum(1).mean() / clean.square().sum(1).mean()
        terms["loss"] = sum(terms.values(), torch.zeros(()))
        return terms

    def forward(self, features: Tensor, context: Context = NEW_IMAGES) -> Inspection:
        seen, distances, inputs = features, [], [features]
        if self.memory is not None:
            seen, distance, least = self.memory(features, context)
            distances = [least]
            if self.sees_distance:
                retrieval_residual = length(features - seen)
                # prototypes added after calibration may lower the score of an image, never raise it
                inputs = [self._distances(d, retrieval_residual, context.training_rows) for d in (distance, least)]
        logits = self.perception.draws(inputs[0])
        mean, deviation = self.perception.moments(logits)
        final = self.perception.masks(mean, deviation)[1]
        restored = self.restoration(seen, final)
        perceived = None
        if self.has_perceived:
            perceived = mean_logit(logits)
            for extended in inputs[1:]:
                perceived = torch.minimum(perceived, mean_logit(self.perception.draws(extended)))
        return Inspection(
            torch.cat([length(features - restored), *distances], dim=1),
            perceived,
            self.regional_map(features, context),
            restored,
            {"mean": mean, "uncertainty": deviation, "mask": final},
        )

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
        if self.memory is not None:
            restoration["Retrieved, drawn"] = Stage("features", self.memory(features)[0][0])
        restoration["Restored, drawn"] = Stage("features", inspection.restored[0])
        restoration["Residual"] = Stage("map", inspection.anomaly_maps[0, :1])
        if self.memory is not None:
            restoration["Distance to the memory"] = Stage("map", inspection.anomaly_maps[0, 1:])
        if inspection.regional is not None:
            restoration["Regional distance"] = Stage("map", inspection.regional[0])
        return {"perception": [("", perception)], "restoration": [("", restoration)]}

    def visualize_training(self, images: Tensor, textures: Tensor | None, rng: Generator) -> Stages:
        """FASM, a row for each source of foreign features: both ends of the range of β, and U of UIAPM.

        Foreign features are shown by the cells of the images that they come from; jitter comes from none.
        """
        options, side = self.options.synthesis, self.features.grid
        bank = None if textures is None else self.embed(textures)
        bank_cells = None if textures is None else _cells(textures, side)
        clean, cells = self.embed(images), _cells(images, side)
        made = sources(clean, bank, 1, rng)
        names = [n for n in ("textures", "others", "shuffles", "jitter") if n in made and getattr(options, n)]
        rows: list[Row] = []
        for row, name in enumerate(names):
            i, seed = row % len(clean), int(torch.randint(2**31, (1,), generator=rng))
            foreign, shown = (  # the same draw of features and of the images that these were made from
                sources(grid, others, 1, Generator().manual_seed(seed))[name]()[i]
                for grid, others in ((clean, bank), (cells, bank_cells))
            )
            mask = perlin_masks(1, side, options, rng)[0]
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
            mixture, distance, _ = self.memory.retrieve(tokens[altered], made_of[of])
        retrieval_residual = (tokens[altered] - mixture).norm(dim=1)
        anew = self._distances(distance.view(-1, 1, 1, 1), retrieval_residual.view(-1, 1, 1, 1), rows[of]).flatten(1)
        return to_grid(to_tokens(seen).flatten(0, 1).index_copy(0, altered, anew.to(seen)).view(len(seen), -1, 2))

    @torch.no_grad()
    def fit_normalization(self, features: Tensor, context: Context) -> None:
        """Also raises τ_U and τ_V so far that hardly any cell of good training images is marked."""
        layers = self._inspected(features, context).layers
        mean, deviation = (layers[name][:, 0] for name in ("mean", "uncertainty"))
        inside = torch.ones_like(mean, dtype=torch.bool) if context.valid is None else context.valid
        self.perception.fit_thresholds(mean[inside], deviation[inside])
        super().fit_normalization(features, context)


def _cells(images: Tensor, side: int) -> Tensor:
    """Images (N, 3, S, S) as a grid whose cells hold their pixels, (N, 3·m², side, side); m about S / side."""
    m = max(1, images.shape[-1] // side)
    return F.pixel_unshuffle(F.interpolate(images, (m * side, m * side), mode="bilinear"), m)


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
