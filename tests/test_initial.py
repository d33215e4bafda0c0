"""What the initial sample fixes: norm limits, frame, variances and b_pre."""

import numpy as np
import pytest
import torch

import oracle
from mlsae import initial
from mlsae.config import MLSAEConfig
from mlsae.errors import DataError
from mlsae.initial import geometric_median, initialise
from mlsae.recipes import RECIPES
from mlsae.sae import MLSAE

torch.set_num_threads(1)
STANDARD, PUBLISHED = RECIPES["standard"], RECIPES["lawson2024"]


def random_resid(n_tokens, seed=0, outliers=0):
    """Three layers of heavy-tailed vectors; the first `outliers` tokens are 100 times as long at layer 1."""
    rng = np.random.default_rng(seed)
    size, offset = 3.0 ** np.arange(3)[:, None, None], rng.normal(size=(3, 1, 4))
    resid = size * (rng.exponential(size=(3, n_tokens, 4)) + offset)
    resid[1, :outliers] *= 100
    return torch.from_numpy(resid)


def make_sae(frame="layer", factor=None, groups=1):
    torch.manual_seed(0)
    shape = {"d_model": 4, "n_latents": 24, "k": 2, "layers": (0, 1, 2), "groups": groups}
    return MLSAE(MLSAEConfig(**shape, frame=frame, mask_norm_factor=factor)).double()


def test_geometric_median_is_the_oracle():
    points = random_resid(200).flatten(0, 1)
    want = oracle.geometric_median(points.numpy())
    np.testing.assert_allclose(geometric_median(points).numpy(), want, atol=1e-4)
    np.testing.assert_allclose(geometric_median(points, 10_000, 1e-12).numpy(), want, atol=1e-9)


def test_geometric_median_of_collinear_points_is_the_middle_one():
    """On a line it is the ordinary median, which an outlier does not move."""
    along = torch.tensor([-1.0, 0.0, 2.0, 3.0, 1000.0]).double()
    direction = torch.tensor([0.6, 0.8]).double()
    got = geometric_median(along[:, None] * direction, 5000, 1e-9)
    torch.testing.assert_close(got, 2 * direction, rtol=0, atol=1e-3)


def test_geometric_median_moves_with_its_points():
    points, shift = random_resid(50).flatten(0, 1), torch.tensor([5.0, -3.0, 0.0, 2.0]).double()
    torch.testing.assert_close(geometric_median(points + shift), geometric_median(points) + shift)


def test_geometric_median_of_equal_points_is_that_point():
    torch.testing.assert_close(geometric_median(torch.ones(7, 3)), torch.ones(3))


def test_norm_limit_is_a_multiple_of_the_first_tokens_median():
    """Of whole batches, as many as hold 1,024 tokens; later tokens do not count."""
    sae, resid = make_sae(factor=3.0), random_resid(3000)
    initialise(sae, iter(resid.split(300, dim=1)), 3000, STANDARD)
    norms = np.linalg.norm(resid.numpy()[:, :1200], axis=-1)
    lower_median = np.sort(norms, axis=1)[:, 599]
    np.testing.assert_allclose(sae.norm_limit.numpy(), 3 * lower_median, rtol=1e-12)


def test_no_norm_limit_when_off():
    sae = make_sae()
    initialise(sae, [random_resid(50)], 50, STANDARD)
    assert sae.norm_limit.isinf().all()


def test_frame_and_variance_are_those_of_the_used_tokens():
    """Used: the batches that reach n_tokens, less tokens over the limit at any layer."""
    sae, resid = make_sae(factor=4.0), random_resid(3000, outliers=5)
    variance = initialise(sae, iter(resid.split(250, dim=1)), 1990, STANDARD)
    norms, limit = np.linalg.norm(resid.numpy()[:, :2000], axis=-1), sae.norm_limit.numpy()
    used = resid.numpy()[:, :2000][:, (norms <= limit[:, None]).all(0)]
    assert 1900 < used.shape[1] <= 1995
    mean, want = oracle.layer_statistics(used)
    np.testing.assert_allclose(sae.frame.mean.numpy(), mean, rtol=1e-11)
    np.testing.assert_allclose(sae.frame.scale.numpy(), np.sqrt(want), rtol=1e-11)
    np.testing.assert_allclose(variance.numpy(), want, rtol=1e-11)
    framed = oracle.framed("layer", used, mean, np.sqrt(want))[0].reshape(-1, 4)
    np.testing.assert_allclose(sae.b_pre.detach().numpy(), oracle.geometric_median(framed), atol=1e-4)


@pytest.mark.parametrize("frame", ["layer", "vector", "none"])
def test_bias_is_the_median_of_framed_vectors(frame):
    sae, resid = make_sae(frame), random_resid(500)
    initialise(sae, [resid], 500, STANDARD)
    mean, variance = oracle.layer_statistics(resid.numpy())
    framed = oracle.framed(frame, resid.numpy(), mean, np.sqrt(variance))[0].reshape(-1, 4)
    want = oracle.geometric_median(framed)
    np.testing.assert_allclose(sae.b_pre.detach().numpy(), want, atol=1e-4 * max(1, np.abs(want).max()))


def test_published_bias_is_the_median_of_raw_vectors():
    """Defect D4."""
    sae, resid = make_sae("vector"), random_resid(500)
    initialise(sae, [resid], 500, PUBLISHED)
    want = oracle.geometric_median(resid.numpy().reshape(-1, 4))
    np.testing.assert_allclose(sae.b_pre.detach().numpy(), want, atol=1e-3)


def test_each_group_has_its_own_bias():
    sae, resid = make_sae("none", groups=3), random_resid(500)
    initialise(sae, [resid], 500, STANDARD)
    for layer in range(3):
        want = oracle.geometric_median(resid[layer].numpy())
        np.testing.assert_allclose(sae.b_pre[layer].detach().numpy(), want, atol=1e-3)


@pytest.mark.parametrize("sizes", [(1000, 500), (1,) * 1500, (1499, 1), (0, 700, 0, 800)])
@pytest.mark.parametrize("factor", [None, 50.0])
def test_batch_size_does_not_matter(sizes, factor):
    """All tokens are below a generous limit, so where the first chunk ends cannot matter either."""
    resid, whole, parts = random_resid(1500), make_sae(factor=factor), make_sae(factor=factor)
    one = initialise(whole, [resid], 1500, STANDARD)
    two = initialise(parts, iter(resid.split(sizes, dim=1)), 1500, STANDARD)
    torch.testing.assert_close(two, one, rtol=1e-11, atol=0)
    for name, tensor in whole.state_dict().items():
        if name != "norm_limit":
            torch.testing.assert_close(parts.state_dict()[name], tensor, rtol=1e-9, atol=1e-11, msg=name)


def test_weights_are_left_alone():
    sae = make_sae()
    W_enc, W_dec = sae.W_enc.detach().clone(), sae.W_dec.detach().clone()
    initialise(sae, [random_resid(50)], 50, STANDARD)
    assert torch.equal(sae.W_enc, W_enc)
    assert torch.equal(sae.W_dec, W_dec)


def test_a_short_sample_is_used_whole():
    one, two, resid = make_sae(factor=10.0), make_sae(factor=10.0), random_resid(40)
    initialise(one, iter(resid.split(7, dim=1)), 32_768, STANDARD)
    initialise(two, [resid], 40, STANDARD)
    for name, tensor in two.state_dict().items():
        torch.testing.assert_close(one.state_dict()[name], tensor, rtol=1e-9, atol=1e-11, msg=name)


def test_the_median_sample_is_thinned_but_not_below_its_size(monkeypatch):
    """At least so many vectors, all layers pooled, however much longer the sample is."""
    seen = []
    monkeypatch.setattr(initial, "MEDIAN_VECTORS", 300)
    monkeypatch.setattr(initial, "geometric_median", lambda points: seen.append(len(points)) or points.mean(0))
    initialise(make_sae(), iter(random_resid(2000).split(100, dim=1)), 2000, STANDARD)
    assert 300 <= seen[0] < 600


@pytest.mark.parametrize("batches", [[], [random_resid(0)], [random_resid(0), random_resid(0)]])
def test_no_token_is_an_error(batches):
    with pytest.raises(DataError, match="no token"):
        initialise(make_sae(), batches, 100, STANDARD)
