"""Building blocks that methods share."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn


class BayesianConv2d(nn.Module):
    """Convolution whose weights are independent Gaussians (Bayes by backprop, Blundell et al. 2015).

    Training samples activations instead of weights (local reparameterisation, Kingma et al. 2015), which needs two
    convolutions whatever the batch. Inspection uses `draws` weight samples, fixed before training (`freeze`), all in
    one grouped convolution: the same picture always gets the same maps.

    Args:
        channels_in, channels_out, kernel: As nn.Conv2d, with "same" padding.
        draws: Number S of weight samples at inspection.
        prior: Standard deviation of the zero-mean Gaussian prior.
        bayesian: False gives a plain convolution: deviations are 0 and so is the KL term (ablation).
    """

    def __init__(
        self, channels_in: int, channels_out: int, kernel: int, draws: int, prior: float, bayesian: bool = True
    ) -> None:
        super().__init__()
        self.draws, self.prior, self.bayesian = draws, prior, bayesian
        self.padding = kernel // 2
        shape = (channels_out, channels_in, kernel, kernel)
        self.weight = nn.Parameter(torch.empty(shape))
        nn.init.kaiming_normal_(self.weight, nonlinearity="relu")
        self.bias = nn.Parameter(torch.zeros(channels_out))
        self.log_deviation = nn.Parameter(torch.full(shape, math.log(0.1 / math.sqrt(shape[1] * kernel**2))))
        self.noise: Tensor
        self.register_buffer("noise", torch.zeros(draws, *shape))

    def freeze(self, rng: Generator) -> None:
        """Fixes the standard normal noise of the weight samples used at inspection."""
        self.noise.copy_(torch.randn(self.noise.shape, generator=rng))

    def sample(self, x: Tensor, rng: Generator) -> Tensor:
        """(N, C_in, h, w) → (N, C_out, h, w), one activation sample per element; differentiable."""
        mean = F.conv2d(x, self.weight, self.bias, padding=self.padding)
        if not self.bayesian:
            return mean
        variance = F.conv2d(x.pow(2), (2 * self.log_deviation).exp(), padding=self.padding)
        noise = torch.randn(mean.shape, generator=rng).to(mean)
        return mean + variance.clamp_min(1e-12).sqrt() * noise

    def forward(self, x: Tensor) -> Tensor:
        """All frozen weight samples at once: (N, C_in or S·C_in, h, w) → (N, S·C_out, h, w), S = 1 if not Bayesian."""
        if not self.bayesian:
            return F.conv2d(x, self.weight, self.bias, padding=self.padding)
        weight = (self.weight + self.log_deviation.exp() * self.noise).flatten(0, 1)
        groups = x.shape[1] // self.weight.shape[1]  # 1 for the first layer, which all samples share
        return F.conv2d(x, weight, self.bias.repeat(self.draws), padding=self.padding, groups=groups)

    def kl(self) -> Tensor:
        """KL(q ‖ prior) in nats, summed over weights; 0 if not Bayesian."""
        if not self.bayesian:
            return self.weight.new_zeros(())
        ratio = (2 * (self.log_deviation - math.log(self.prior))).exp()
        return 0.5 * (ratio + (self.weight / self.prior).pow(2) - 1 - ratio.log()).sum()


def sincos_positions(side: int, width: int) -> Tensor:
    """Fixed 2-D sine-cosine positions of a side×side token grid, (side², width); width divisible by 4."""
    omega = 10000 ** -(torch.arange(width // 4) / (width / 4))
    angles = torch.arange(side)[:, None] * omega
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, width/2)
    rows, columns = axis[:, None].expand(-1, side, -1), axis[None].expand(side, -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)


class AttentionBlock(nn.Module):
    """Pre-norm transformer block whose keys can be restricted (masked attention).

    Args:
        width, heads: Token width, divisible by the number of heads.
        ratio: Hidden width of the feed-forward part over `width`.
    """

    def __init__(self, width: int, heads: int, ratio: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, ratio * width), nn.GELU(), nn.Linear(ratio * width, width))

    def forward(self, x: Tensor, allowed: Tensor | None = None) -> Tensor:
        """x (N, T, width); `allowed` broadcastable to (N, heads, T, T) bool: True where query may see key."""
        n, t, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (N, heads, T, width/heads)
        if self.training and x.device.type == "cpu":  # the fused kernel's backward pass takes five times as long there
            logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
            attended = (logits if allowed is None else logits.masked_fill(~allowed, -1e4)).softmax(-1).to(v) @ v
        else:
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        x = x + self.out(attended.transpose(1, 2).reshape(n, t, width))
        return x + self.mlp(self.norm2(x))


def greedy_coreset(tokens: Tensor, n: int, rng: Generator, sketch: int = 64) -> Tensor:
    """Indices of n tokens that cover all: each next one is the farthest from those chosen (k-centre greedy).

    Distances are taken after a random projection to `sketch` dimensions (Johnson-Lindenstrauss), as PatchCore does.
    Every time the number of chosen tokens doubles, the better covered half of the candidates is dropped: tokens that
    are covered well hardly ever become the farthest. So all tokens take part for the cost of a small sample of them.

    Args:
        tokens: (T, C) float32.

    Returns:
        (min(n, T),) int64.
    """
    t, c = tokens.shape
    if n >= t:
        return torch.arange(t)
    x = tokens @ torch.randn(c, sketch, generator=rng) / sketch**0.5 if sketch < c else tokens.clone()
    norms = x.pow(2).sum(1)
    ids = torch.arange(t)
    nearest = torch.full((t,), torch.inf)
    last = int(torch.randint(t, (1,), generator=rng))
    chosen = [last]
    halve_at = 256
    while len(chosen) < n:
        nearest = torch.minimum(nearest, torch.addmv(norms + norms[last], x, x[last], alpha=-2))
        if len(chosen) >= halve_at and len(x) > 4 * n:
            kept = nearest >= nearest.median()
            x, norms, ids, nearest = x[kept], norms[kept], ids[kept], nearest[kept]
            halve_at *= 2
        last = int(nearest.argmax())
        chosen.append(int(ids[last]))
    return torch.tensor(chosen)


def to_tokens(features: Tensor) -> Tensor:
    """(N, C, g, g) → (N, g², C)."""
    return features.flatten(2).transpose(1, 2)


def to_grid(tokens: Tensor) -> Tensor:
    """(N, g², C) → (N, C, g, g)."""
    n, t, c = tokens.shape
    side = math.isqrt(t)
    return tokens.transpose(1, 2).reshape(n, c, side, side)


def gaussian_blur(maps: Tensor, sigma: float) -> Tensor:
    """(N, 1, H, W) smoothed by a Gaussian of the given deviation in pixels, edges replicated; 0 leaves it as it is."""
    if sigma <= 0:
        return maps
    radius = min(math.ceil(4 * sigma), maps.shape[-1] - 1)
    x = torch.arange(-radius, radius + 1, device=maps.device, dtype=maps.dtype)
    kernel = (-0.5 * (x / sigma) ** 2).exp()
    kernel = kernel / kernel.sum()
    padded = F.pad(maps, (radius,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))
