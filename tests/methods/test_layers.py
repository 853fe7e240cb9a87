import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage
from skimage.metrics import structural_similarity
from torch import Generator, Tensor

from unflaw.methods.layers import (
    BayesianConv2d,
    gaussian_blur,
    gradient_magnitude,
    gradient_magnitude_similarity,
    greedy_coreset,
    local_mean,
    sincos_positions,
    ssim_map,
    to_grid,
    to_tokens,
)
from unflaw.methods.restoration_attention import RestorationBlock


def rng(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=rng(seed))


def convolution(a: int = 3, b: int = 4, kernel: int = 3, draws: int = 5, seed: int = 0, **options) -> BayesianConv2d:
    """With deviations and a bias that matter."""
    layer = BayesianConv2d(a, b, kernel, draws, prior=0.3, **options)
    with torch.no_grad():
        layer.weight.copy_(0.2 * randn(*layer.weight.shape, seed=seed))
        layer.log_deviation.copy_(-1.5 + 0.3 * randn(*layer.weight.shape, seed=seed + 1))
        layer.bias.copy_(randn(b, seed=seed + 2))
    layer.freeze(rng(seed + 3))
    return layer


# Bayesian convolution


def test_kl_is_that_of_two_gaussians():
    layer = convolution()
    q = torch.distributions.Normal(layer.weight, layer.log_deviation.exp())
    expected = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 0.3)).sum()
    torch.testing.assert_close(layer.kl(), expected)
    with torch.no_grad():
        layer.weight.zero_()
        layer.log_deviation.fill_(math.log(0.3))
    assert layer.kl().item() == pytest.approx(0, abs=1e-4)


def test_samples_have_the_mean_and_variance_of_random_weights():
    """Against the definition: a convolution with weights drawn from their Gaussians."""
    layer, x = convolution(2, 3), randn(1, 2, 4, 4, seed=9)
    n = 20_000
    weights = layer.weight + layer.log_deviation.exp() * randn(n, *layer.weight.shape, seed=1)
    drawn = F.conv2d(x, weights.flatten(0, 1), layer.bias.repeat(n), padding=1).view(n, 3, 4, 4)
    sampled = layer.sample(x.expand(n, -1, -1, -1), rng())
    assert sampled.shape == (n, 3, 4, 4)
    torch.testing.assert_close(sampled.mean(0), drawn.mean(0), atol=0.06, rtol=0.02)
    torch.testing.assert_close(sampled.std(0), drawn.std(0), atol=0.02, rtol=0.04)


def test_samples_are_reproducible_and_give_gradients():
    layer, x = convolution(), randn(2, 3, 5, 5)
    assert torch.equal(layer.sample(x, rng(1)), layer.sample(x, rng(1)))
    assert not torch.equal(layer.sample(x, rng(1)), layer.sample(x, rng(2)))
    layer.sample(x, rng(1)).square().mean().backward()
    for parameter in (layer.weight, layer.bias, layer.log_deviation):
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0


def test_inspection_uses_fixed_weights_one_group_of_channels_per_draw():
    layer, x = convolution(), randn(2, 3, 6, 6)
    out = layer(x)
    assert out.shape == (2, 5 * 4, 6, 6)
    assert torch.equal(out, layer(x))
    for s in range(5):
        weight = layer.weight + layer.log_deviation.exp() * layer.noise[s]
        torch.testing.assert_close(out[:, 4 * s : 4 * s + 4], F.conv2d(x, weight, layer.bias, padding=1))
    assert not torch.allclose(out[:, :4], out[:, 4:8], atol=1e-2)


def test_layers_in_a_chain_keep_their_draws_apart():
    layers = [convolution(3, 4), convolution(4, 6, seed=10), convolution(6, 1, kernel=1, seed=20)]
    x = together = randn(2, 3, 6, 6)
    for layer in layers:
        together = layer(together).relu()
    for s in range(5):
        alone = x
        for layer in layers:
            weight = layer.weight + layer.log_deviation.exp() * layer.noise[s]
            alone = F.conv2d(alone, weight, layer.bias, padding=layer.weight.shape[-1] // 2).relu()
        torch.testing.assert_close(together[:, s : s + 1], alone)


def test_the_same_generator_freezes_the_same_noise():
    a, b = convolution(seed=0), convolution(seed=0)
    assert torch.equal(a.noise, b.noise) and a.noise.std() == pytest.approx(1, abs=0.1)
    b.freeze(rng(99))
    assert not torch.equal(a.noise, b.noise)
    assert "noise" in a.state_dict()  # a saved detector must draw what the trained one drew


def test_without_bayes_it_is_a_plain_convolution():
    layer, x = convolution(bayesian=False), randn(2, 3, 6, 6)
    expected = F.conv2d(x, layer.weight, layer.bias, padding=1)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.sample(x, rng()), expected)
    assert layer.kl() == 0


# Attention


def test_attention_of_two_tokens_by_hand():
    """Queries are the normalised surroundings, keys and values the tokens: (1, −1) and (−1, 1) both."""
    block = RestorationBlock(2, 1, 2)
    with torch.no_grad():
        for part in (
            block.mlp[-1].weight,
            block.mlp[-1].bias,
            block.query.bias,
            block.keys_values.bias,
            block.out.bias,
        ):
            part.zero_()
        block.query.weight.copy_(torch.eye(2))
        block.keys_values.weight.copy_(torch.eye(2).repeat(2, 1))
        block.out.weight.copy_(torch.eye(2))
    x, tokens = torch.tensor([[[3.0, 1.0], [0.0, 2.0]]]), torch.tensor([[[1.0, -1.0], [-1.0, 1.0]]])
    # q·k is 2 for equal tokens and −2 for others, over √2; the weight of the own token is σ(4 / √2)
    own = 1 / (1 + math.exp(-4 / math.sqrt(2)))
    y = own - (1 - own)
    expected = torch.tensor([[[3 + y, 1 - y], [-y, 2 + y]]])
    everything = torch.ones(1, 1, 1, 2, dtype=torch.bool)
    torch.testing.assert_close(block(x, tokens, everything), expected, atol=1e-4, rtol=0)
    only_first = torch.tensor([True, False]).view(1, 1, 1, 2)
    expected = torch.tensor([[[4.0, 0.0], [1.0, 1.0]]])
    torch.testing.assert_close(block(x, tokens, only_first), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("training", [True, False])
def test_attention_of_several_heads_against_the_formula(training):
    """The same with and without gradients, which take another way."""
    block, x, tokens = RestorationBlock(12, 3, 6), randn(2, 7, 12), randn(2, 7, 6, seed=2)
    allowed = torch.rand(2, 1, 1, 7, generator=rng(3)) > 0.4
    allowed[..., 0] = True
    with torch.set_grad_enabled(training):
        q, (k, v) = block.query(block.norm1(x)), block.keys_values(tokens).chunk(2, dim=-1)
        heads = []
        for h in range(3):
            part = slice(4 * h, 4 * h + 4)
            logits = q[..., part] @ k[..., part].transpose(1, 2) / 2
            logits = logits.masked_fill(~allowed[:, 0], -torch.inf)
            heads.append(logits.softmax(-1) @ v[..., part])
        y = x + block.out(torch.cat(heads, dim=-1))
        expected = y + block.mlp(block.norm2(y))
        torch.testing.assert_close(block(x, tokens, allowed), expected, atol=1e-5, rtol=1e-5)


def test_masked_keys_have_no_influence():
    block, x, tokens = RestorationBlock(8, 2, 8), randn(1, 5, 8), randn(1, 5, 8, seed=2)
    allowed = torch.tensor([True, True, False, True, False]).view(1, 1, 1, 5)
    changed = tokens.clone()
    changed[0, [2, 4]] = 100 * randn(2, 8, seed=1)
    torch.testing.assert_close(block(x, tokens, allowed), block(x, changed, allowed))
    everything = torch.ones_like(allowed)  # unmasked they would have
    assert not torch.allclose(block(x, tokens, everything)[0, 0], block(x, changed, everything)[0, 0], atol=1e-3)


def test_positions_are_distinct_and_of_equal_length():
    positions = sincos_positions((8, 8), 32)
    assert positions.shape == (64, 32)
    torch.testing.assert_close(positions.square().sum(1), torch.full((64,), 16.0))
    assert torch.cdist(positions, positions).fill_diagonal_(9).min() > 0.1
    # rows before columns, as `to_tokens` flattens: neighbours in a row share the half that tells the row
    assert torch.equal(positions[0, :16], positions[7, :16]) and torch.equal(positions[0, 16:], positions[56, 16:])


def test_positions_of_a_rectangle_are_a_part_of_those_of_a_square():
    wide, tall, square = (sincos_positions(shape, 32) for shape in ((4, 8), (8, 4), (8, 8)))
    assert torch.equal(wide.view(4, 8, 32), square.view(8, 8, 32)[:4])
    assert torch.equal(tall.view(8, 4, 32), square.view(8, 8, 32)[:, :4])


# Coreset


def brute_force_greedy(tokens: Tensor, n: int, first: int) -> list[int]:
    chosen = [first]
    while len(chosen) < n:
        distances = (tokens[:, None] - tokens[chosen][None]).norm(dim=-1).amin(1)
        chosen.append(int(distances.argmax()))
    return chosen


def coverage(tokens: Tensor, chosen: Tensor) -> float:
    return float(torch.cdist(tokens, tokens[chosen]).amin(1).max())


@pytest.mark.parametrize("block", [1, 2, 7, 256])
def test_coreset_is_k_centre_greedy(block):
    """Up to 256 tokens are chosen before any candidate is dropped, and 8 channels are not sketched: exact."""
    for seed in range(5):
        tokens = randn(120, 8, seed=seed)
        chosen = greedy_coreset(tokens, 30, rng(seed), block=block)
        assert chosen.tolist() == brute_force_greedy(tokens, 30, int(chosen[0]))


def test_coreset_covers_better_than_chance():
    tokens = torch.cat([randn(2000, 100), 6 + randn(20, 100, seed=1)])  # a few tokens of a rare kind
    chosen = greedy_coreset(tokens, 100, rng())
    assert len(chosen.unique()) == 100 and chosen.dtype == torch.int64
    assert (chosen >= 2000).any()
    by_chance = [coverage(tokens, torch.randperm(len(tokens), generator=rng(seed))[:100]) for seed in range(5)]
    assert coverage(tokens, chosen) < min(by_chance)


def test_coreset_still_covers_when_candidates_are_dropped():
    tokens = torch.rand(6000, 3, generator=rng())
    n = 600  # dropping begins at 256 of them, and again at 512
    chosen = greedy_coreset(tokens, n, rng())
    assert len(chosen.unique()) == n and int(chosen.min()) >= 0 and int(chosen.max()) < 6000
    exact = coverage(tokens, torch.tensor(brute_force_greedy_fast(tokens, n, int(chosen[0]))))
    assert coverage(tokens, chosen) < 1.3 * exact


def brute_force_greedy_fast(tokens: Tensor, n: int, first: int) -> list[int]:
    chosen, nearest = [first], torch.full((len(tokens),), torch.inf)
    while len(chosen) < n:
        nearest = torch.minimum(nearest, (tokens - tokens[chosen[-1]]).norm(dim=1))
        chosen.append(int(nearest.argmax()))
    return chosen


def test_coreset_of_everything_and_of_repeated_tokens():
    tokens = randn(10, 4)
    assert greedy_coreset(tokens, 10, rng()).tolist() == greedy_coreset(tokens, 99, rng()).tolist() == list(range(10))
    repeated = tokens.repeat(10, 1)
    assert coverage(repeated, greedy_coreset(repeated, 10, rng())) < 1e-3


def test_coreset_leaves_the_tokens_alone_and_depends_on_the_generator_only():
    tokens = randn(500, 80)
    before = tokens.clone()
    assert torch.equal(greedy_coreset(tokens, 20, rng(1)), greedy_coreset(tokens, 20, rng(1)))
    assert not torch.equal(greedy_coreset(tokens, 20, rng(1)), greedy_coreset(tokens, 20, rng(2)))
    assert torch.equal(tokens, before)


# Small things


def test_tokens_and_grid_are_inverse():
    features = randn(2, 3, 5, 4)
    tokens = to_tokens(features)
    assert torch.equal(to_grid(tokens, (5, 4)), features)
    assert torch.equal(tokens[1, 4 * 2 + 3], features[1, :, 2, 3])  # row by row


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.5, 4.0])
def test_gaussian_blur_is_that_of_scipy(sigma):
    maps = torch.rand(2, 1, 40, 40, generator=rng())
    radius = math.ceil(4 * sigma)
    expected = [ndimage.gaussian_filter(m[0].numpy(), sigma, mode="nearest", radius=radius) for m in maps]
    np.testing.assert_allclose(gaussian_blur(maps, sigma)[:, 0].numpy(), np.stack(expected), atol=1e-5)


def test_gaussian_blur_keeps_constants_and_does_nothing_at_zero():
    constant = torch.full((1, 1, 16, 16), 3.7)
    torch.testing.assert_close(gaussian_blur(constant, 3.0), constant)
    maps = torch.rand(1, 1, 16, 16, generator=rng())
    assert torch.equal(gaussian_blur(maps, 0.0), maps)
    assert gaussian_blur(maps, 30.0).isfinite().all()  # wider than the map


# Structural similarity


@pytest.mark.parametrize("window", [1, 3, 7, 11])
def test_local_mean_is_that_of_the_places_inside(window):
    x = randn(2, 3, 9, 6)
    expected = F.avg_pool2d(x, window, 1, window // 2, count_include_pad=False)
    torch.testing.assert_close(local_mean(x, window), expected)
    with torch.autocast("cpu", torch.bfloat16):  # variances are small differences of means
        torch.testing.assert_close(local_mean(x, window), expected)


@pytest.mark.parametrize("window", [3, 7, 11])
def test_ssim_of_one_channel_is_that_of_scikit_image(window):
    x = torch.rand(20, 24, generator=rng())
    y = (x + 0.2 * randn(20, 24, seed=1)).clamp(0, 1)
    options = {"win_size": window, "data_range": 1.0, "use_sample_covariance": False}
    _, expected = structural_similarity(x.double().numpy(), y.double().numpy(), full=True, **options)
    found = ssim_map(x[None, None], y[None, None], window)[0, 0].numpy()
    inside = np.s_[window // 2 : -(window // 2), window // 2 : -(window // 2)]
    np.testing.assert_allclose(found[inside], expected[inside], atol=2e-4)


def test_similarity_of_the_same_is_1_and_of_others_less():
    x, y = randn(2, 5, 16, 16), randn(2, 5, 16, 16, seed=1)
    for similarity in (ssim_map, gradient_magnitude_similarity):
        torch.testing.assert_close(similarity(x, x), torch.ones(2, 1, 16, 16), atol=1e-4, rtol=0)
        assert similarity(x, y).max() < 1
        torch.testing.assert_close(similarity(x, y), similarity(y, x))
    torch.testing.assert_close(gradient_magnitude_similarity(x, x, scales=3), torch.ones(2, 1, 16, 16))


def test_ssim_counts_channels_by_their_energy():
    x = torch.cat([randn(1, 1, 12, 12), 1e-3 * randn(1, 1, 12, 12, seed=1)], dim=1)
    y = torch.cat([x[:, :1], -x[:, 1:]], dim=1)  # all wrong in a channel that hardly counts
    assert ssim_map(x, y).min() > 0.99
    y = torch.cat([randn(1, 1, 12, 12, seed=2), x[:, 1:]], dim=1)
    assert ssim_map(x, y).max() < 0.6


def test_gradient_magnitude_by_hand():
    """A step of 6 between columns: Prewitt gives 6 on both sides. A slope of 2 a row: 4 over two rows, 2 at edges."""
    step = torch.tensor([0.0, 0, 6, 6]).expand(1, 1, 4, 4)
    slope = 2 * torch.arange(4.0)[:, None].expand(1, 1, 4, 4)
    both = gradient_magnitude(torch.cat([step, slope], dim=1))[0]
    torch.testing.assert_close(both[0], torch.tensor([0.0, 6, 6, 0]).expand(4, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(both[1], torch.tensor([2.0, 4, 4, 2])[:, None].expand(4, 4))


def test_gms_by_hand():
    """Gradients of 6 and 3 beside the step: (2·6·3 + c) / (36 + 9 + c); far from it c / c."""
    step = torch.tensor([0.0, 0, 6, 6]).expand(1, 1, 4, 4)
    found = gradient_magnitude_similarity(step, 0.5 * step, constant=5.0)
    expected = torch.tensor([1.0, 41 / 50, 41 / 50, 1.0]).expand(1, 1, 4, 4)
    torch.testing.assert_close(found, expected)
    # at half the size the step is between two places, whose gradients are 6 and 3 too
    coarse = gradient_magnitude_similarity(step, 0.5 * step, constant=5.0, scales=2)
    torch.testing.assert_close(coarse, (expected + 41 / 50) / 2)
    two = torch.cat([step, torch.zeros_like(step)], dim=1)
    torch.testing.assert_close(gradient_magnitude_similarity(two, 0.5 * two, constant=5.0), expected)


@pytest.mark.parametrize("side", [1, 2, 5, 9])
def test_scales_of_any_side_give_finite_gradients(side):
    x, y = torch.zeros(1, 2, side, side, requires_grad=True), randn(1, 2, side, side)
    (ssim_map(x, y).sum() + gradient_magnitude_similarity(x, y, scales=4).sum()).backward()
    assert x.grad.isfinite().all()
