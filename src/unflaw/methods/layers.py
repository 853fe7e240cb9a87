"""Building blocks that methods share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

DEPTH = 16  # values in each group of `largest`


class BayesianConv2d(nn.Module):
    """Convolution whose weights are independent Gaussians (Bayes by backprop, Blundell et al. 2015).

    Training samples activations instead of weights (local reparameterisation, Kingma et al. 2015), which needs two
    convolutions whatever the batch. Inspection uses `draws` weight samples, fixed before training (`freeze`), all in
    one grouped convolution: the same image always gets the same maps.

    Args:
        channels_in, channels_out, kernel: As nn.Conv2d, with "same" padding.
        draws: Number S of weight samples at inspection.
        prior: Standard deviation of the zero-mean Gaussian prior.
        bayesian: False gives a plain convolution: deviations are 0 and so is the KL term (ablation).
    """

    no_decay = ("log_deviation",)

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
        usual = math.log(0.1 / math.sqrt(shape[1] * kernel**2))
        self.log_deviation = nn.Parameter(torch.full(shape, usual), requires_grad=bayesian)
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


def coarser(valid: Tensor) -> Tensor:
    """Cells of the coarser grid that hold any valid cell: (N, g, g) → (N, ⌈g/2⌉, ⌈g/2⌉) bool."""
    return F.max_pool2d(valid.float()[:, None], 2, ceil_mode=True)[:, 0] > 0


def sincos_positions(shape: tuple[int, int], width: int) -> Tensor:
    """Fixed 2-D sine-cosine positions of a grid of tokens, (rows · columns, width); width divisible by 4."""
    omega = 10000 ** -(torch.arange(width // 4) / (width / 4))
    angles = torch.arange(max(shape))[:, None] * omega
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, width/2)
    rows, columns = axis[: shape[0], None].expand(-1, shape[1], -1), axis[None, : shape[1]].expand(shape[0], -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)


class Attention(nn.Module):
    """Multi-head self-attention whose keys can be restricted (masked attention).

    Args:
        width, heads: Token width, divisible by the number of heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, allowed: Tensor | None = None) -> Tensor:
        """x (N, T, width); `allowed` broadcastable to (N, heads, T, T) bool: True where query may see key."""
        n, t, width = x.shape
        qkv = self.qkv(x).view(n, t, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (N, heads, T, width/heads)
        attended = attend(q, k, v, allowed)
        return self.out(attended.transpose(1, 2).reshape(n, t, width))


def attend(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention, (N, heads, T, width/heads) each; `allowed` (…, T, T) bool: query may see key."""
    if query.requires_grad and query.device.type == "cpu":  # the fused kernel's backward pass takes five times as long
        logits = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        return (logits if allowed is None else logits.masked_fill(~allowed, -1e4)).softmax(-1).to(value) @ value
    return F.scaled_dot_product_attention(query, key, value, attn_mask=allowed)


def greedy_coreset(tokens: Tensor, n: int, rng: Generator, sketch: int = 64, block: int = 256) -> Tensor:
    """Indices of n tokens that cover all: each next one is the farthest from those chosen (k-centre greedy).

    Distances are taken after a random projection to `sketch` dimensions (Johnson-Lindenstrauss), as PatchCore does.
    Every time the number of chosen tokens doubles, the better covered half of the candidates is dropped: tokens that
    are covered well hardly ever become the farthest. So all tokens take part for the cost of a small sample of them.

    The farthest `block` tokens are looked at together: as long as one of them is farther than all the others were, it
    is the farthest of all. Only then do all tokens hear of those chosen, in one matrix product.

    Args:
        tokens: (T, C) float32.

    Returns:
        (min(n, T),) int64.
    """
    t, c = tokens.shape
    if n >= t:
        return torch.arange(t)
    x = tokens @ torch.randn(c, sketch, generator=rng) / sketch**0.5 if sketch < c else tokens.clone()
    norms, ids = x.square().sum(1), torch.arange(t)
    nearest = torch.full((t,), torch.inf)
    new = torch.randint(t, (1,), generator=rng)
    chosen = new.tolist()
    halve_at = 256
    while len(chosen) < n:
        for part in torch.arange(len(x)).split(2**14):  # their (2¹⁴, block) distances stay small
            apart = torch.addmm(norms[new], x[part], x[new].T, alpha=-2).amin(1) + norms[part]
            nearest[part] = torch.minimum(nearest[part], apart)
        if len(chosen) >= halve_at and len(x) > 4 * n:
            kept = nearest >= nearest.median()
            x, norms, ids, nearest = x[kept], norms[kept], ids[kept], nearest[kept]
            halve_at *= 2
        new = _farthest(x, nearest, block, n - len(chosen))
        chosen += ids[new].tolist()
    return torch.tensor(chosen)


def _farthest(x: Tensor, nearest: Tensor, block: int, most: int) -> Tensor:
    """Up to `most` next choices of k-centre greedy, one at least, from x (T, C) and squared distances (T,)."""
    found = nearest.topk(min(block + 1, len(x)))
    candidates, left = found.indices[:block], found.values[:block].numpy()
    others = float(found.values[block]) if len(x) > block else -torch.inf
    apart = torch.cdist(x[candidates], x[candidates]).square().numpy()
    chosen = [0]
    while len(chosen) < most:
        left = np.minimum(left, apart[chosen[-1]])
        if left.max() < others:
            break
        chosen.append(int(left.argmax()))
    return candidates[chosen]


def largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Computes `values.topk(k)` of rows (T, M) faster for large M: values and indices (T, k), descending.

    `DEPTH` values that lie M / DEPTH apart form a group. The k groups with the largest members contain the k largest
    values, so only these are sorted.
    """
    groups = values.shape[1] // DEPTH
    if values.shape[1] % DEPTH or groups < 4 * k:
        return values.topk(k)
    grouped = values.unflatten(1, (DEPTH, groups))
    leading = grouped.amax(1).topk(k).indices  # (T, k)
    candidates = grouped.gather(2, leading[:, None].expand(-1, DEPTH, -1))  # (T, DEPTH, k)
    found, place = candidates.flatten(1).topk(k)
    return found, place // k * groups + leading.gather(1, place % k)


def to_tokens(features: Tensor) -> Tensor:
    """(N, C, rows, columns) → (N, rows · columns, C)."""
    return features.flatten(2).transpose(1, 2)


def to_grid(tokens: Tensor, shape: Sequence[int]) -> Tensor:
    """(N, T, C) → (N, C, rows, columns), `shape` the rows and columns of the T tokens."""
    return tokens.transpose(1, 2).unflatten(2, (shape[0], shape[1]))


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


def ssim_map(x: Tensor, y: Tensor, window: int = 11, constants: tuple[float, float] = (0.01**2, 0.03**2)) -> Tensor:
    """Structural similarity (Wang et al. 2004) at every place: twice (N, C, h, w) → (N, 1, h, w), at most 1.

    Of vectors (ours): means multiply as inner products, variances and covariances are summed over channels, so that a
    channel counts by its energy. C = 1 is the published formula. Local statistics are plain means over a window.

    Args:
        window: Odd side of the window; at the border the part inside.
        constants: C1 and C2, (0.01 L)² and (0.03 L)² for values of range L.
    """
    c1, c2 = constants
    mx, my = local_mean(x, window), local_mean(y, window)
    means, crossed = _dot(mx, mx) + _dot(my, my), _dot(mx, my)
    variances = local_mean(_dot(x, x) + _dot(y, y), window) - means
    covariance = local_mean(_dot(x, y), window) - crossed
    return (2 * crossed + c1) * (2 * covariance + c2) / ((means + c1) * (variances + c2))


def gradient_magnitude_similarity(x: Tensor, y: Tensor, constant: float = 0.0026, scales: int = 1) -> Tensor:
    """GMS (Xue et al. 2014) at every place: twice (N, C, h, w) → (N, 1, h, w) in (0, 1].

    (2 Σ g(x)·g(y) + c) / (Σ g(x)² + Σ g(y)² + c) with Prewitt gradient magnitudes g, the sums over channels (ours);
    C = 1 is the published formula. Several scales, each half the size of the last, are averaged (RIAD's MSGMS).

    Args:
        constant: c; the default is for values in [0, 1].
    """
    total = torch.zeros_like(x[:, :1])
    for _ in range(scales):
        a, b = gradient_magnitude(x), gradient_magnitude(y)
        similarity = (2 * _dot(a, b) + constant) / (_dot(a, a) + _dot(b, b) + constant)
        total = total + F.interpolate(similarity, total.shape[-2:], mode="nearest") / scales
        x, y = (F.avg_pool2d(t, 2, ceil_mode=True) for t in (x, y))
    return total


def gradient_magnitude(x: Tensor) -> Tensor:
    """Length of the Prewitt gradient of every channel, (N, C, h, w) → (N, C, h, w); edges replicated."""
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    across, down = padded[..., 2:] - padded[..., :-2], padded[..., 2:, :] - padded[..., :-2, :]
    across = (across[..., :-2, :] + across[..., 1:-1, :] + across[..., 2:, :]) / 3
    down = (down[..., :-2] + down[..., 1:-1] + down[..., 2:]) / 3
    return (across.square() + down.square() + 1e-12).sqrt()  # its derivative at 0 would be infinite


def local_mean(x: Tensor, window: int) -> Tensor:
    """(N, C, h, w): mean over window×window, an odd number of places; at the border over those inside.

    Two products with banded matrices: on the processor several times as fast as average pooling.
    """
    with torch.autocast(x.device.type, enabled=False):  # variances are small differences of means
        x = x.float()
        rows, columns = (_band(side, window).to(x) for side in x.shape[-2:])
        return rows @ x @ columns.T


def _band(side: int, window: int) -> Tensor:
    place = torch.arange(side)
    near = ((place - place[:, None]).abs() <= window // 2).float()
    return near / near.sum(1, keepdim=True)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(1, keepdim=True)
