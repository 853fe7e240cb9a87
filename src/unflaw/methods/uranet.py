"""URA-Net (arXiv 2603.22840): uncertainty-integrated anomaly perception and restoration attention.

    F ──▶ FASM (training only) ──▶ F_a ──▶ UIAPM ──▶ U, V ──▶ M_U, M_final ──▶ RAM ──▶ F̂,   map = residual of F and F̂

The parts and their names are the paper's. Its hyper-parameters are not public to us: sizes, thresholds and losses are
our own, measured choices. Ours as well, each with a switch of its own:

* a memory of prototypes (`restoration.prototypes`): RAM restores from what it recalls, and the distance to it joins the
  map; with `perception.input = "distance"` UIAPM sees how far F is from it instead of F;
* a second memory of whole regions (`restoration.coarse_prototypes`), which joins map and score;
* U in the image score (`perception.in_score`).

Without the first, F̂ is what RAM's network predicts and nothing else. Why: docs/research.md.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from unflaw.config import Config, Perception, Restoration, URANetOptions, WeightSource
from unflaw.methods.base import Batch, Inspection, Method
from unflaw.methods.layers import AttentionBlock, BayesianConv2d, sincos_positions, to_grid, to_tokens
from unflaw.methods.memory_bank import MemoryBank, RegionalMemoryBank
from unflaw.methods.synthesis import Anomalies, blend, perlin_masks, sources, synthesise
from unflaw.methods.visualization import Row, Stage, Stages
from unflaw.parallel.shares import WHOLE, Share

SUREST = math.log(1e6 - 1)  # logit that counts at most


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

    def sample(self, features: Tensor, rng: Generator, share: Share = WHOLE) -> Tensor:
        """F (N, C, g, g) of a share → logits (N, 1, g, g) of one draw per activation, for training."""
        x = self.narrow(features)
        for layer in self.bayesian_layers():
            x = layer.sample(F.relu(x), rng, share)
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

    def loss(self, logits: Tensor, mask: Tensor, n_images: int, share: Share = WHOLE) -> dict[str, Tensor]:
        """BCE + Dice against M, and KL / N (our reading of the loss). Dice is of all images of a batch together."""
        bce = F.binary_cross_entropy_with_logits(logits, mask)
        p = logits.sigmoid()
        dice = 1 - (2 * share.total((p * mask).sum()) + 1) / (share.total(p.sum() + mask.sum()) + 1)
        cells = n_images * mask[0].numel()
        kl = sum((layer.kl() for layer in self.bayesian_layers()), torch.zeros(())) * self.options.kl_weight / cells
        return {"perception": bce + 0.5 * dice, "kl": kl}


class RAM(nn.Module):
    """Restoration attention: F̂ from what is unmarked in the image and from the memory of normal tokens.

    1. Attention to the prototypes turns each token into a mixture of normal ones (`MemoryBank`). It is not trained;
       alone it is a soft nearest-neighbor search, where restoration starts. Nothing but this mixture goes on, so what
       is not normal cannot be copied through.
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
        nn.init.zeros_(self.widen.weight)  # training starts at the recall, or at the mean of F, and corrects it
        nn.init.zeros_(self.widen.bias)

    def forward(self, seen: Tensor, marked: Tensor) -> Tensor:
        """Steps 2 and 3. Recall or, without prototypes, F (N, C, g, g); marked (N, 1, g, g) in {0, 1} → F̂, as F."""
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

    finishes = (*Method.finishes, "perception.thresholds")

    def __init__(self, config: Config, weights: WeightSource = None) -> None:
        options = config.network
        assert isinstance(options, URANetOptions)
        self.kinds = 2 if options.restoration.prototypes else 1  # residual and, with a memory, distance to it
        self.perceives, self.judges = options.perception.in_score, options.restoration.coarse_prototypes > 0
        self.uses_textures = options.synthesis.textures > 0
        super().__init__(config, weights)
        self.options = options
        channels, prototypes = self.features.channels, options.restoration.prototypes
        self.memory = MemoryBank(prototypes, channels, options.restoration.sharpness) if prototypes else None
        self.judge = RegionalMemoryBank(options.restoration.coarse_prototypes, self.features) if self.judges else None
        self.sees_distance = prototypes > 0 and options.perception.input == "distance"
        self.perception = UIAPM(2 if self.sees_distance else channels, options.perception)
        self.restoration = RAM(channels, config.features.grid, options.restoration)
        self.textures: Tensor | None = None
        self.n_images = 1

    def setup(
        self, features: Tensor, textures: Tensor | None, rng: Generator, categories: Tensor | None = None
    ) -> Batch:
        self.textures, self.n_images = textures, len(features)
        for layer in self.perception.bayesian_layers():
            layer.freeze(rng)
        if self.memory is not None:
            self.memory.fit(features, rng, categories)
        if self.judge is not None:
            self.judge.fit(features, rng, categories)
        if self.memory is None:
            return {}
        return self.memory.recall_cached(features, self.config.training.cache_gb * 2**30)

    def loss(self, batch: Batch, rng: Generator, share: Share = WHOLE) -> dict[str, Tensor]:
        """FASM on F; UIAPM against M; RAM from what M leaves of the recall, against the clean F."""
        everything = batch["features"]
        anomalies = synthesise(everything, self.textures, self.options.synthesis, rng, share)
        images = batch["image"].long().cpu() if "image" in batch else None
        batch = {name: share.take(rows) for name, rows in batch.items()}
        logits = self.perception.sample(self._altered_evidence(anomalies, batch, images), rng, share)
        terms = self.perception.loss(logits, anomalies.mask, self.n_images, share)
        # altered cells are the marked ones, which become mask tokens: the recall of F serves for that of F_a
        restored = self.restoration(batch.get("recalled", anomalies.features), anomalies.mask)
        difference = (restored - batch["features"]).square().sum(1).mean()
        terms["restoration"] = difference / everything.square().sum(1).mean()
        terms["loss"] = sum(terms.values(), torch.zeros(()))
        return terms

    def forward(
        self,
        features: Tensor,
        images: Tensor | None = None,
        valid: Tensor | None = None,
        held_out: Tensor | None = None,
    ) -> Inspection:
        seen, distances, evidence = features, [], [features]
        if self.memory is not None:
            seen, distance, least = self.memory(features, images, held_out)
            distances = [least]
            if self.sees_distance:
                retrieval_residual = length(features - seen)
                # prototypes added after calibration may lower the evidence of an image, never raise it
                evidence = [self._evidence(d, retrieval_residual, images) for d in (distance, least)]
        logits = self.perception.draws(evidence[0])
        mean, deviation = self.perception.moments(logits)
        final = self.perception.masks(mean, deviation)[1]
        restored = self.restoration(seen, final)
        perceived = None
        if self.perceives:
            perceived = mean_logit(logits)
            for calmed in evidence[1:]:
                perceived = torch.minimum(perceived, mean_logit(self.perception.draws(calmed)))
        return Inspection(
            torch.cat([length(features - restored), *distances], dim=1),
            perceived,
            None if self.judge is None else self.judge(features, images, valid, held_out),
            restored,
            {"mean": mean, "uncertainty": deviation, "mask": final},
        )

    def stages(self, features: Tensor, inspection: Inspection) -> Stages:
        """Perception: what UIAPM makes of the image. Restoration: what RAM does, and all evidence."""
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
            restoration["Recalled, drawn"] = Stage("features", self.memory(features)[0][0])
        restoration["Restored, drawn"] = Stage("features", inspection.restored[0])
        restoration["Residual"] = Stage("map", inspection.anomaly_maps[0, :1])
        if self.memory is not None:
            restoration["Distance to the memory"] = Stage("map", inspection.anomaly_maps[0, 1:])
        if inspection.coarse is not None:
            restoration["Coarse evidence"] = Stage("map", inspection.coarse[0])
        return {"perception": [("", perception)], "restoration": [("", restoration)]}

    def exercises(self, images: Tensor, textures: Tensor | None, rng: Generator) -> Stages:
        """FASM, a row for each source of foreign features: both ends of the range of β, and what UIAPM says of them.

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
                tiles[f"beta {beta:g}: what UIAPM says, U"] = Stage("share", self(altered).layers["mean"][0])
            rows.append((name, tiles))
        farthest = max((float(t.values.max()) for _, row in rows for t in row.values() if t.kind == "map"), default=0)
        return {"fasm": [(name, {h: t._replace(limit=farthest) for h, t in row.items()}) for name, row in rows]}

    def _evidence(self, distance: Tensor, retrieval_residual: Tensor, images: Tensor | None = None) -> Tensor:
        """Distance to the memory and to the recall, both (N, 1, g, g) → (N, 2, g, g) in units of the usual distance.

        What UIAPM sees where there is a memory (ours). From F itself it learns to know the artificial anomalies and not
        the real ones; how far F is from normal means the same for both.
        """
        assert self.memory is not None
        return torch.cat([distance, retrieval_residual], dim=1) / self.memory.unit(images) - 1

    def _altered_evidence(self, anomalies: Anomalies, batch: Batch, images: Tensor | None = None) -> Tensor:
        """What UIAPM sees of F_a; recalled anew are the altered cells only, not from the images they are made of.

        Args:
            anomalies: Of a share of a batch.
            batch: What is cached of the share.
            images: (B,) those of the whole batch, rows of the cache; None: the share is all of it.
        """
        if self.memory is None or not self.sees_distance:
            return anomalies.features
        own = batch["image"].long().cpu()
        seen = self._evidence(batch["distance"], length(batch["features"] - batch["recalled"]), own)
        tokens = to_tokens(anomalies.features).flatten(0, 1)
        altered = anomalies.mask.flatten().nonzero()[:, 0]
        made_of = torch.stack([own, (own if images is None else images)[anomalies.origin]], dim=1)
        of = altered.cpu() // (len(tokens) // len(own))
        with torch.no_grad():
            mixture, distance, _ = self.memory.recall(tokens[altered], made_of[of])
        retrieval_residual = (tokens[altered] - mixture).norm(dim=1)
        own = own[of]
        anew = self._evidence(distance.view(-1, 1, 1, 1), retrieval_residual.view(-1, 1, 1, 1), own).flatten(1)
        return to_grid(to_tokens(seen).flatten(0, 1).index_copy(0, altered, anew.to(seen)).view(len(seen), -1, 2))

    @torch.no_grad()
    def finish(self, features: Tensor, valid: Tensor | None = None, images: Tensor | None = None) -> None:
        """Also raises τ_U and τ_V so far that hardly any cell of good training images is marked."""
        rows = torch.arange(len(features)) if images is None else images
        layers = self._inspected(features, rows, valid).layers
        mean, deviation = (layers[name][:, 0] for name in ("mean", "uncertainty"))
        inside = torch.ones_like(mean, dtype=torch.bool) if valid is None else valid
        self.perception.fit_thresholds(mean[inside], deviation[inside])
        super().finish(features, valid, images)


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
