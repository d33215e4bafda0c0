"""Frames are invertible, and the `layer` frame folds into ordinary per-layer SAEs."""

import numpy as np
import pytest
import torch

import oracle
from mlsae.config import MLSAEConfig
from mlsae.frames import VECTOR_EPS, Frame
from mlsae.sae import MLSAE

torch.set_num_threads(1)


def random_resid(seed=0, shape=(3, 7, 5), dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    size = 3.0 ** torch.arange(shape[0]).view(-1, *[1] * (len(shape) - 1))
    return (size * (torch.randn(shape, generator=generator) + 1)).to(dtype)


def fitted(name, resid):
    """A frame fitted to these very vectors."""
    frame = Frame(name, resid.shape[0], resid.shape[-1]).to(resid.dtype)
    mean = resid.flatten(1, -2).mean(1)
    frame.fit(mean, (resid.flatten(1, -2) - mean[:, None]).square().mean((1, 2)))
    return frame


@pytest.mark.parametrize("shape", [(3, 7, 5), (1, 4, 5), (3, 2, 6, 5)])
@pytest.mark.parametrize("name", ["layer", "vector", "none"])
def test_unframing_undoes_framing(name, shape):
    """Exactly, but for the epsilon that `vector` adds on the way in and not on the way out."""
    resid = random_resid(shape=shape)
    frame = fitted(name, resid)
    shift, scale = frame.shift_and_scale(resid, list(range(shape[0])))
    back = frame.apply_to(resid, shift, scale) * scale + shift
    shrunk = (scale / (scale + VECTOR_EPS)) if name == "vector" else 1
    torch.testing.assert_close(back, (resid - shift) * shrunk + shift, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(back, resid, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["layer", "vector", "none"])
def test_frames_are_the_equations(name):
    resid = random_resid()
    frame = fitted(name, resid)
    shift, scale = frame.shift_and_scale(resid, [0, 1, 2])
    mean, variance = oracle.layer_statistics(resid.numpy())
    want, want_shift, want_scale = oracle.framed(name, resid.numpy(), mean, np.sqrt(variance))
    np.testing.assert_allclose(frame.apply_to(resid, shift, scale).numpy(), want, rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose((resid * scale + shift).numpy(), resid.numpy() * want_scale + want_shift, rtol=1e-12)


def test_layer_frame_gives_every_layer_mean_0_and_variance_1():
    resid = random_resid()
    frame = fitted("layer", resid)
    x = frame.apply_to(resid, *frame.shift_and_scale(resid, [0, 1, 2]))
    torch.testing.assert_close(x.mean(1), torch.zeros(3, 5).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(x.square().mean((1, 2)), torch.ones(3).double())


def test_vector_frame_gives_every_vector_mean_0_and_unbiased_variance_1():
    resid = random_resid()
    frame = fitted("vector", resid)
    x = frame.apply_to(resid, *frame.shift_and_scale(resid, [0, 1, 2]))
    torch.testing.assert_close(x.mean(-1), torch.zeros(3, 7).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(x.var(-1), torch.ones(3, 7).double(), rtol=1e-3, atol=0)


def test_a_zero_vector_stays_zero():
    """The published code's masked vectors (D5)."""
    resid = torch.zeros(2, 3, 5)
    frame = Frame("vector", 2, 5)
    shift, scale = frame.shift_and_scale(resid, [0, 1])
    assert not frame.apply_to(resid, shift, scale).any()
    assert not scale.any()


def test_rows_pick_their_own_statistics():
    resid = random_resid()
    frame = fitted("layer", resid)
    shift, scale = frame.shift_and_scale(resid, [0, 1, 2])
    some_shift, some_scale = frame.shift_and_scale(resid[[2, 0]], [2, 0])
    assert torch.equal(some_shift, shift[[2, 0]])
    assert torch.equal(some_scale, scale[[2, 0]])


def test_layer_frame_folds_into_plain_saes():
    """Folding is exact: W_enc / sigma, b_enc = -W_enc (b_pre + mu / sigma), sigma W_dec, b_dec = sigma b_pre + mu."""
    torch.manual_seed(0)
    resid = random_resid()
    sae = MLSAE(MLSAEConfig(d_model=5, n_latents=20, k=3, layers=(0, 1, 2))).double()
    sae.b_pre.data.normal_()
    sae.frame = fitted("layer", resid)
    code, recon = sae(resid)
    for layer, (mu, sigma) in enumerate(zip(sae.frame.mean, sae.frame.scale, strict=True)):
        b_enc = -sae.W_enc @ (sae.b_pre + mu / sigma)
        pre_acts = resid[layer] @ (sae.W_enc / sigma).T + b_enc
        top = pre_acts.topk(3)
        plain = torch.zeros_like(pre_acts).scatter(-1, top.indices, top.values.relu())
        torch.testing.assert_close(code.to_dense()[layer], plain, rtol=1e-10, atol=1e-12)
        out = plain @ (sigma * sae.W_dec) + sigma * sae.b_pre + mu
        torch.testing.assert_close(recon[layer], out, rtol=1e-10, atol=1e-12)
