"""Metrics by hand, and streaming sums that do not care how the tokens came."""

import dataclasses

import numpy as np
import pytest
import torch

from mlsae.metrics import Moments, ReconstructionSums, cross_entropy, fvu, fvu_lawson2024, kl_divergence

torch.set_num_threads(1)
X, XH = torch.tensor([[[0.0, 4.0], [2.0, 6.0]]]), torch.tensor([[[1.0, 5.0], [1.0, 5.0]]])
SPLITS = [(60,), (8,) * 7 + (4,), (1,) * 60, (0, 17, 0, 42, 1)]


def case(seed=0, n_tokens=60):
    """resid, recon, values in float64."""
    generator = torch.Generator().manual_seed(seed)
    size = 10.0 ** torch.arange(3).view(3, 1, 1)
    resid = size * (torch.randn(3, n_tokens, 5, generator=generator) + 2).double()
    recon = resid + size * torch.randn(3, n_tokens, 5, generator=generator).double()
    return resid, recon, torch.randn(3, n_tokens, 4, generator=generator).relu().double()


def summed(parts):
    sums = ReconstructionSums(3, 5)
    for part in parts:
        sums.update(*part)
    return sums


def split(tensors, sizes):
    return list(zip(*(tensor.split(sizes, dim=1) for tensor in tensors), strict=True))


def standard_fields(quality):
    """Everything but the published definitions, which are means over batches."""
    return {name: value for name, value in vars(quality).items() if "lawson2024" not in name}


def test_fvu_by_hand():
    assert fvu(X, XH).tolist() == [1.0]
    assert fvu_lawson2024(X, XH).tolist() == pytest.approx([3 / 20])
    sums = ReconstructionSums(1, 2)
    sums.update(X, XH, torch.tensor([[[1.0, 0.0], [2.0, 0.5]]]))
    quality = sums.quality()
    assert (quality.fvu.item(), quality.mse.item(), quality.l0.item(), quality.l1.item()) == (1.0, 1.0, 1.5, 1.75)
    assert quality.fvu_lawson2024.item() == pytest.approx(3 / 20)
    assert quality.mse_lawson2024.item() == 1.0
    cosines = [20 / np.sqrt(16 * 26), 32 / np.sqrt(40 * 26)]
    assert quality.cosine.item() == pytest.approx(np.mean(cosines))
    assert quality.norm_ratio.item() == pytest.approx(np.mean([np.sqrt(26 / 16), np.sqrt(26 / 40)]))


def test_fvu_is_0_when_perfect_and_1_for_the_mean():
    resid, _, values = case()
    mean = resid.mean(1, keepdim=True).expand_as(resid)
    assert not fvu(resid, resid).any()
    torch.testing.assert_close(fvu(resid, mean), torch.ones(3).double())
    torch.testing.assert_close(summed([(resid, mean, values)]).quality().fvu, torch.ones(3).double())
    perfect = summed([(resid, resid, values)]).quality()
    assert not perfect.fvu.any()
    torch.testing.assert_close(perfect.cosine, torch.ones(3).double())
    torch.testing.assert_close(perfect.norm_ratio, torch.ones(3).double())


def test_streaming_fvu_is_the_pure_function():
    resid, recon, values = case()
    quality = summed([(resid, recon, values)]).quality()
    torch.testing.assert_close(quality.fvu, fvu(resid, recon), rtol=1e-12, atol=0)
    torch.testing.assert_close(quality.fvu_lawson2024, fvu_lawson2024(resid, recon), rtol=1e-12, atol=0)


@pytest.mark.parametrize("sizes", SPLITS)
def test_results_do_not_depend_on_the_batch_size(sizes):
    whole, parts = summed([case()]).quality(), summed(split(case(), sizes)).quality()
    for name, value in standard_fields(whole).items():
        torch.testing.assert_close(getattr(parts, name), value, rtol=1e-12, atol=0, msg=name)


@pytest.mark.parametrize("sizes", SPLITS[1:])
def test_merging_is_adding(sizes):
    parts = split(case(), sizes)
    merged, all_at_once = summed(parts[:2]), summed(parts)
    merged.merge(summed([]))
    merged.merge(summed(parts[2:]))
    for name, value in vars(all_at_once.quality()).items():
        torch.testing.assert_close(getattr(merged.quality(), name), value, rtol=1e-12, atol=0, equal_nan=True, msg=name)


def test_token_order_does_not_matter():
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    one, two = summed([case()]).quality(), summed([tuple(x[:, order] for x in case())]).quality()
    for name in (field.name for field in dataclasses.fields(one)):
        torch.testing.assert_close(getattr(two, name), getattr(one, name), rtol=1e-12, atol=0)


def test_published_metrics_are_means_over_batches():
    parts = split(case(), (40, 20))
    want = torch.stack([fvu_lawson2024(*part[:2]) for part in parts]).mean(0)
    torch.testing.assert_close(summed(parts).quality().fvu_lawson2024, want)


@pytest.mark.parametrize("sizes", SPLITS)
def test_moments_are_the_definition(sizes):
    resid = case()[0]
    whole, other = Moments(3, 5), Moments(3, 5)
    parts = resid.split(sizes, dim=1)
    for i, part in enumerate(parts):
        (whole if i % 2 else other).update(part)
    whole.merge(other)
    exact = resid.numpy()
    mean = exact.mean(1)
    variance = ((exact - mean[:, None]) ** 2).mean((1, 2))
    assert whole.n_tokens == 60
    np.testing.assert_allclose(whole.mean.numpy(), mean, rtol=1e-12)
    np.testing.assert_allclose(whole.variance.numpy(), variance, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_survive_a_huge_mean(dtype):
    """Unit variance about 10,000 in one pass over what the tensor holds: no cancellation."""
    generator = torch.Generator().manual_seed(0)
    offset = 1e4 if dtype == torch.float32 else 30.0
    resid = (torch.randn(2, 5000, 7, generator=generator) + offset).to(dtype)
    moments = Moments(2, 7)
    for part in resid.split(333, dim=1):
        moments.update(part)
    exact = resid.double()
    mean = exact.mean(1)
    tolerance = 1e-9 if dtype == torch.float32 else 1e-5
    torch.testing.assert_close(moments.mean, mean, rtol=1e-12, atol=0)
    want = (exact - mean[:, None]).square().mean((1, 2))
    torch.testing.assert_close(moments.variance, want, rtol=tolerance, atol=0)


def test_bfloat16_vectors_give_the_float32_fvu_within_1_percent():
    """N14."""
    resid, recon, values = (x.float() for x in case(n_tokens=2000))
    low = summed([(resid.bfloat16(), recon.bfloat16(), values.bfloat16())]).quality()
    torch.testing.assert_close(low.fvu, summed([(resid, recon, values)]).quality().fvu, rtol=1e-2, atol=0)


def test_kl_by_hand():
    clean, spliced = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    assert kl_divergence(clean, spliced).item() == pytest.approx(0.14384, abs=5e-6)
    assert kl_divergence(spliced, clean).item() == pytest.approx(0.13081, abs=5e-6)
    assert kl_divergence(clean, clean).item() == 0


def test_kl_is_per_position_and_not_negative():
    clean, spliced = torch.randn(2, 4, 3, 11, generator=torch.Generator().manual_seed(0)).double().log_softmax(-1)
    kl = kl_divergence(clean, spliced)
    assert kl.shape == (4, 3)
    assert (kl > 0).all()
    p, q = clean.exp().numpy(), spliced.exp().numpy()
    np.testing.assert_allclose(kl.numpy(), (p * np.log(p / q)).sum(-1), rtol=1e-12)


def test_cross_entropy_by_hand():
    """The last position predicts nothing."""
    log_probs = torch.tensor([[0.5, 0.5], [0.25, 0.75], [0.1, 0.9]]).log()
    assert cross_entropy(log_probs, torch.tensor([0, 1, 0])).tolist() == pytest.approx([-np.log(0.5), -np.log(0.25)])
