"""The object for SAEBench: the SAE's own outputs in dense codes, unit decoder rows, and everything its evaluations ask for."""

import json

import pytest
import torch

from mlsae import MLSAE
from mlsae.downstream.saebench import LayerSAE
from mlsae.errors import ConfigError
from mlsae.frames import Lens
from test_sae import make_resid, make_sae

KINDS = {
    "layer": {"frame": "layer"},
    "vector": {"frame": "vector"},
    "none": {"frame": "none"},
    "groups": {"frame": "layer", "groups": 2},
    "lens": {"frame": "layer", "lens": "somewhere"},
    "bias": {"frame": "vector", "latent_bias": True},
    "thresholds": {"frame": "layer", "latent_bias": True, "activation": "jumprelu"},
}
ASKED = "model_name d_in d_sae hook_layer hook_name context_size hook_head_index architecture apply_b_dec_to_input"
ASKED += (
    " finetuning_scaling_factor activation_fn_str activation_fn_kwargs prepend_bos normalize_activations dtype device"
)
ASKED += " model_from_pretrained_kwargs dataset_path dataset_trust_remote_code seqpos_slice training_tokens"
ASKED += " sae_lens_training_version neuronpedia_id"


def made(kind: str) -> MLSAE:
    """An SAE whose decoder rows have very different norms: a choice of the k largest that counted them would be another."""
    sae = make_sae(**KINDS[kind])
    sae.W_dec.data *= torch.logspace(-1, 1, len(sae.W_dec))[torch.randperm(len(sae.W_dec)), None]
    if sae.b_enc is not None:
        sae.b_enc.data.normal_()
    if sae.threshold is not None:
        sae.threshold.uniform_(-0.5, 1)
    if sae.lens is not None:
        lens = Lens(sae.layers, 6)
        lens.weight, lens.bias = torch.randn(4, 6, 6) / 20, torch.randn(4, 6)
        sae.set_lens(lens)
    return sae


def of(sae: MLSAE, layer: int, **more) -> LayerSAE:
    return LayerSAE.of(sae, layer, model_name="tiny", **more)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_codes_and_reconstructions_are_the_saes_own(kind):
    sae, resid = made(kind), make_resid(batch=(3, 50))
    for row, layer in enumerate(sae.layers):
        code, one = sae.encode(resid[row : row + 1], [layer]), of(sae, layer)
        own = slice(size := sae.config.group_of(row) * 24, size + 24)
        got, want = one.encode(resid[row]), code.to_dense()[0][..., own]
        torch.testing.assert_close(got / one.norms, want, rtol=1e-4, atol=1e-5)
        assert 0 < (want > 0).sum() < want.numel() / 2
        torch.testing.assert_close(one.decode(got), sae.decode(code)[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(one(resid[row]), one.decode(got), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_decoder_rows_have_unit_norm_and_a_zero_row_stays_zero(kind):
    sae = made(kind)
    sae.W_dec.data[5] = 0
    one = of(sae, 1)
    norms = torch.ones(24)
    norms[5] = 0
    torch.testing.assert_close(one.W_dec.detach().norm(dim=1), norms)
    assert one(make_resid()[1]).isfinite().all()


def test_by_hand():
    """Two latents of which the smaller pre-activation has the longer decoder row; k = 1 keeps the larger."""
    sae = make_sae(frame="none", layers=(7,), d_model=2, n_latents=2, k=1)
    sae.W_enc.data, sae.W_dec.data, sae.b_pre.data = (
        torch.tensor(x) for x in ([[2.0, 0], [0, 1]], [[3.0, 0], [0, 50]], [1.0, 0])
    )
    one = of(sae, 7)
    assert one.encode(torch.tensor([3.0, 3])).tolist() == [
        12,
        0,
    ]  # (3 - 1) * 2 * 3: the row's norm is in the activation
    assert one(torch.tensor([3.0, 3])).tolist() == [13, 0]


def test_vectors_of_their_own_mean_are_decoded_only_where_they_were_encoded():
    one, resid = of(made("vector"), 0), make_resid(batch=(5,))
    codes = torch.rand(5, 24)
    with pytest.raises(ConfigError, match=r"feature_acts: of \[5\] vectors, not of those encoded last"):
        one.decode(codes)
    one.encode(resid[0])
    one.decode(codes)
    with pytest.raises(ConfigError, match="encode them first"):
        one.decode(codes[:4])
    of(made("layer"), 0).decode(codes)


def test_it_says_what_saebench_asks_for():
    one = of(made("thresholds"), 2, context_size=64)
    assert (one.W_enc.shape, one.W_dec.shape, one.b_enc.shape, one.b_dec.shape) == ((6, 24), (24, 6), (24,), (6,))
    said = one.cfg.to_dict()
    assert said.keys() == set(ASKED.split())
    json.dumps(said)
    assert (one.cfg.hook_layer, one.cfg.hook_name, one.cfg.d_in, one.cfg.d_sae) == (
        2,
        "blocks.2.hook_resid_post",
        6,
        24,
    )
    assert (one.cfg.architecture, one.cfg.dtype, one.cfg.context_size) == ("jumprelu", "float32", 64)
    one.cfg.metadata = one.cfg.architecture_str = "it writes more into cfg"
    assert "metadata" not in one.cfg.to_dict()


def test_the_type_is_that_of_the_weights():
    one = of(made("layer"), 0)
    assert (one.dtype, one.device) == (torch.float32, torch.device("cpu"))
    assert one.to(torch.bfloat16) is one
    assert one.dtype == torch.bfloat16 == one.encode(make_resid()[0].bfloat16()).dtype
    assert of(made("layer"), 0, dtype=torch.float16).cfg.dtype == "float16"


def test_it_is_a_copy():
    sae = made("none")
    before = sae.W_enc.detach().clone()
    one = of(sae, 0)
    for parameter in one.parameters():
        parameter.data.zero_()
    assert torch.equal(sae.W_enc, before)
    assert sae.b_pre.any()


def test_what_cannot_be_told_is_asked_for():
    with pytest.raises(ConfigError, match="layers: 9 was not trained on; this SAE has 0, 1, 2, 3"):
        of(made("layer"), 9)
    with pytest.raises(ConfigError, match="model_name: the SAE does not say"):
        LayerSAE.of(made("layer"), 0)
    with pytest.raises(ConfigError, match="lens: a tuned lens before frame 'vector'"):
        of(make_sae(frame="vector", lens="somewhere"), 0)
