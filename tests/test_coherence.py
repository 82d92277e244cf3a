"""How far the gradients of single positions point one way (paper 6.2): `coherence` of
experiments/cost.py, with every gradient G = g h' written out."""

import itertools
import math

import cost
import pytest
import torch


def directions(count, V=5, H=4):
    """g (count, V), h (count, H)."""
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(count, V, dtype=torch.float64, generator=generator)
    h = torch.randn(count, H, dtype=torch.float64, generator=generator)
    return g, h


def in_chunks(g, h, size):
    return cost.coherence(zip(g.split(size), h.split(size)))


def test_coherence_is_its_definition_on_the_whole_matrices():
    """So are the null, the mean cosine of all pairs and the mean size. A position without a
    gradient has no direction."""
    g, h = directions(7)
    g[3] = 0
    G = torch.einsum("nv,nh->nvh", g, h).flatten(1)  # (7, V H)
    sizes = G.norm(dim=-1)
    unit = G[sizes > 0] / sizes[sizes > 0].unsqueeze(-1)
    cosines = unit @ unit.T  # (6, 6)
    pairs = torch.triu_indices(6, 6, offset=1)
    expected = {
        "coherence": (G.mean(0).norm() / sizes.mean()).item(),
        "null": (sizes.norm() / sizes.sum()).item(),
        "cosine": cosines[pairs[0], pairs[1]].mean().item(),
        "size": sizes.mean().item(),
        "positions": 6,
    }
    assert in_chunks(g, h, 3) == pytest.approx(expected)


@pytest.mark.parametrize("size", [1, 3, 10])
def test_gradients_that_are_all_one_cohere_fully(size):
    """Coherence and cosine are 1, whatever the chunks."""
    g, h = directions(1)
    found = in_chunks(g.expand(10, -1), h.expand(10, -1), size)
    assert found["coherence"] == pytest.approx(1) and found["cosine"] == pytest.approx(1)
    assert found["null"] == pytest.approx(10**-0.5)


def test_the_null_is_the_root_mean_square_over_all_signs():
    """It is exact over all 64 sign patterns of six gradients, because the cross terms cancel."""
    g, h = directions(6)
    squares = []
    for signs in itertools.product((-1.0, 1.0), repeat=6):
        turned = g * torch.tensor(signs, dtype=torch.float64).unsqueeze(-1)
        squares.append(in_chunks(turned, h, 6)["coherence"] ** 2)
    assert in_chunks(g, h, 6)["null"] == pytest.approx(math.sqrt(sum(squares) / 64))


@pytest.mark.parametrize("scale", [1e-4, -3.0, 1e4])
def test_coherence_knows_neither_chunks_nor_axes_nor_scale(scale):
    """The cut and a rotation of logits and states change nothing. A scale changes only the size."""
    g, h = directions(9)
    rotation, _ = torch.linalg.qr(directions(5)[0])
    whole = in_chunks(g, h, 9)
    for size in (1, 2, 5):
        assert in_chunks(g, h, size) == pytest.approx(whole)
    assert in_chunks(g @ rotation, h, 4) == pytest.approx(whole)
    scaled = in_chunks(scale * g, h, 4)
    assert scaled.pop("size") == pytest.approx(abs(scale) * whole.pop("size"))
    assert scaled == pytest.approx(whole)


def test_opposite_gradients_cancel():
    """6.2: single gradients may be large, and their mean 0."""
    g, h = directions(5)
    found = in_chunks(torch.cat([g, -2 * g]), torch.cat([h, h / 2]), 4)
    assert found["coherence"] == pytest.approx(0, abs=1e-9)
    assert found["size"] > 1 and found["cosine"] < 0


@pytest.mark.parametrize("count", [0, 1])
def test_one_gradient_has_nothing_to_agree_with(count):
    """Fewer than two positions with a gradient are refused: their coherence would be 1."""
    g, h = directions(4)
    g[count:] = 0
    with pytest.raises(ValueError, match="two positions"):
        in_chunks(g, h, 2)
