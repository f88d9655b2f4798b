"""Noise of sampling: what it is said to be, distributed as it should be, and nobody else's business."""
import random

import pytest
import torch

from safeeraser.decoding import gumbel, RowSampler, uniform

pytestmark = pytest.mark.filterwarnings("ignore")


def by_hand(seed: int, position: int, token: int) -> float:
    "The formula in numbers of Python, unsigned."
    def mix(x):
        for factor, shift in ((0x7feb352d, 16), (0x846ca68b, 15)): x = ((x ^ (x >> shift)) * factor) % 2**32
        return x ^ (x >> 16)
    low, high = seed % 2**32, seed // 2**32
    factor = mix((mix(mix(low) ^ high) + position) % 2**32) // 2 | 1
    summand = mix(mix((mix(high) + low) % 2**32) ^ mix(position))
    drawn = mix((mix(token) * factor + summand) % 2**32)
    return min((drawn + .5) / 2**32, 1 - 2**-24)


def test_the_noise_is_the_formula_s():
    rng = random.Random(0)
    seeds = [0, 1, 2**31, 2**32 - 1, 2**32, 2**62, 2**63 - 1, *(rng.getrandbits(63) for _ in range(20))]
    for position in (0, 1, 511, 2**20):
        found = uniform(torch.tensor(seeds), position, 400)
        for row, token in [(r, t) for r in range(len(seeds)) for t in (0, 1, 2, 255, 399)]:
            assert found[row, token].item() == pytest.approx(by_hand(seeds[row], position, token), rel=2**-22, abs=2**-24)


def chi_squared(counts: torch.Tensor, expected: torch.Tensor) -> float:
    "In standard deviations from what chance gives."
    freedom = counts.numel() - 1
    return ((((counts - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** .5).item()


def together(a: torch.Tensor, b: torch.Tensor, bins: int = 16) -> float:
    "How far two numbers from 0 to 1 are from being independent and uniform, in standard deviations."
    joint = ((a * bins).long() * bins + (b * bins).long()).flatten().bincount(minlength=bins * bins).double()
    return chi_squared(joint, torch.full_like(joint, a.numel() / bins**2))


SEEDS = {"small": torch.arange(64), "bits": 2 ** torch.arange(62), "high": torch.arange(64) * 2**32, "random": torch.randint(2**62, (64,), generator=torch.Generator().manual_seed(0))}


@pytest.mark.parametrize("kind", SEEDS)
def test_the_noise_is_uniform_and_independent(kind):
    made = torch.stack([uniform(SEEDS[kind], k, 2000) for k in range(12)], 1)  # [seeds, positions, tokens]
    assert 0 < made.min() and made.max() < 1
    counts = (made * 1000).long().flatten().bincount(minlength=1000).double()
    assert abs(chi_squared(counts, torch.full_like(counts, made.numel() / 1000))) < 4
    pairs = {"tokens": (made[..., 1:], made[..., :-1]), "positions": (made[:, 1:], made[:, :-1]), "seeds": (made[1:], made[:-1]),
             "far tokens": (made[..., 1024:], made[..., :-1024]), "token and position": (made[:, 1:, 1:], made[:, :-1, :-1]), "seed and token": (made[1:, :, 1:], made[:-1, :, :-1]),
             "seed and position": (made[1:, 1:], made[:-1, :-1])}
    for name, pair in pairs.items(): assert abs(together(*pair)) < 4.5, name
    rows = made.flatten(0, 1) - .5
    alike = (rows @ rows.T / rows.shape[1] * 12 - torch.eye(len(rows))).abs().max()
    assert alike < 6 / rows.shape[1] ** .5 * 1.2  # of 290,000 pairs; no row is another's


def test_the_upper_tail_is_a_gumbel_s():
    noise = torch.cat([gumbel(torch.arange(500), k, 2000).flatten() for k in range(4)])
    for above in (2, 5, 8, 10):
        expected = -torch.expm1(-torch.exp(torch.tensor(-float(above), dtype=torch.double))) * len(noise)
        assert abs((noise > above).sum() - expected) < 5 * expected ** .5
    assert noise.isfinite().all()


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (1.0, .9), (.7, .8), (2.0, .95)])
def test_frequencies_are_the_nucleus_s(temperature, top_p):
    p, n = torch.tensor([.02, .39, .06, .25, .003, .15, .1, .027]).double(), 40000
    q = p ** (1 / temperature) / (p ** (1 / temperature)).sum()
    kept, mass = torch.zeros_like(q), 0.0
    for k in q.argsort(descending=True).tolist():
        if mass >= top_p: break
        kept[k], mass = q[k], mass + q[k].item()
    expected = kept / kept.sum() * n
    drawn = RowSampler(range(n), temperature, top_p)(torch.empty(n, 3), p.log().float().expand(n, -1)).argmax(-1).bincount(minlength=8).double()
    at = expected > 0
    assert (drawn[~at] == 0).all() and abs(chi_squared(drawn[at], expected[at])) < 4


def test_draws_follow_one_another_independently():
    p, n = torch.full((4,), .25), 20000
    sampler = RowSampler(range(n), 1.0, 1.0)
    first, second = (sampler(torch.empty(n, k), p.log().expand(n, -1)).argmax(-1) for k in (0, 1))
    joint = (first * 4 + second).bincount(minlength=16).double()
    neighbours = (first[1:] * 4 + first[:-1]).bincount(minlength=16).double()
    for counts in (joint, neighbours): assert abs(chi_squared(counts, torch.full_like(counts, counts.sum() / 16))) < 4


def test_a_row_s_draw_is_its_own():
    "Whoever shares the batch, in whatever order, and however many have left."
    g = torch.Generator().manual_seed(0)
    scores, seeds, order = torch.randn(50, 300, generator=g), torch.randint(2**62, (50,), generator=g), torch.randperm(50, generator=g)
    sampler, written = RowSampler(seeds.tolist(), 1.0, .9), torch.empty(50, 4)
    whole = sampler(written, scores)
    assert torch.equal(sampler(written, scores), whole)  # nothing is used up
    assert torch.equal(sampler.rows(order.tolist())(written, scores[order]), whole[order])
    for k in (0, 17, 49): assert torch.equal(RowSampler([seeds[k].item()], 1.0, .9)(written[:1], scores[k:k + 1]), whole[k:k + 1])
    assert not torch.equal(sampler(torch.empty(50, 5), scores), whole)
