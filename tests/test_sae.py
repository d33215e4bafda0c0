"""The autoencoder: purity, symmetries, groups and layer subsets, and files that give back what was saved."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from mlsae.config import MLSAEConfig
from mlsae.errors import ConfigError, MlsaeError, ModelError
from mlsae.formats.own import CONFIG_FILE, WEIGHTS_FILE
from mlsae.reading import Reading
from mlsae.sae import MLSAE
from mlsae.untrusted import tensors_metadata

torch.set_num_threads(1)
FRAMES = ("layer", "vector", "none")
LAYERS = (0, 1, 2, 3)


def make_sae(seed=0, frame="layer", groups=1, layers=LAYERS, **changes):
    """An SAE none of whose tensors is at its initial value."""
    torch.manual_seed(seed)
    shape = {"d_model": 6, "n_latents": 24 * groups, "k": 4, "groups": groups, "layers": layers, "frame": frame}
    sae = MLSAE(MLSAEConfig(**{**shape, **changes}))
    sae.b_pre.data.normal_()
    sae.norm_limit.uniform_(50, 100)
    sae.frame.fit(torch.randn(len(layers), sae.config.d_model), torch.rand(len(layers)) + 0.5)
    return sae


def make_resid(seed=0, n_layers=4, batch=(7,)):
    return torch.randn(n_layers, *batch, 6, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name


# ---- encode and decode ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_code_is_k_distinct_latents_of_its_own_group(frame, groups):
    code = make_sae(frame=frame, groups=groups).encode(make_resid(batch=(3, 5)))
    assert code.values.shape == code.indices.shape == (4, 3, 5, 4)
    assert (code.values >= 0).all()
    assert (code.indices.sort(-1).values.diff(dim=-1) > 0).all()
    owner = torch.arange(4) * groups // 4
    assert torch.equal(code.indices // 24, owner.view(4, 1, 1, 1).expand_as(code.indices))


@pytest.mark.parametrize("frame", FRAMES)
def test_encode_and_decode_change_nothing(frame):
    sae, resid = make_sae(frame=frame), make_resid()
    before, held = {name: t.clone() for name, t in sae.state_dict().items()}, resid.clone()
    rng = torch.get_rng_state()
    one, two = sae.encode(resid), sae.encode(resid)
    assert torch.equal(one.values, two.values)
    assert torch.equal(one.indices, two.indices)
    assert torch.equal(sae.decode(one), sae.decode(one))
    assert_same(sae.state_dict(), before)
    assert torch.equal(resid, held)
    assert torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize("frame", FRAMES)
def test_permuting_latents_permutes_the_code_and_leaves_recon(frame):
    sae, permuted, order = make_sae(frame=frame), make_sae(frame=frame), torch.randperm(24)
    with torch.no_grad():
        permuted.W_enc.copy_(sae.W_enc[order])
        permuted.W_dec.copy_(sae.W_dec[order])
    (code, recon), (code_2, recon_2) = sae(make_resid()), permuted(make_resid())
    torch.testing.assert_close(code_2.to_dense(), code.to_dense()[..., order])
    torch.testing.assert_close(recon_2, recon)


@pytest.mark.parametrize("frame", FRAMES)
def test_a_token_is_encoded_alone(frame):
    """Neither its neighbours nor the shape of the batch matter."""
    sae, resid = make_sae(frame=frame).double(), make_resid(batch=(3, 5)).double()
    dense, recon = sae.encode(resid).to_dense(), sae(resid)[1]
    flat = sae.encode(resid.flatten(1, 2))
    torch.testing.assert_close(flat.to_dense().view_as(dense), dense)
    one = resid[:, 1, 2][:, None]
    torch.testing.assert_close(sae.encode(one).to_dense()[:, 0], dense[:, 1, 2])
    torch.testing.assert_close(sae(one)[1][:, 0], recon[:, 1, 2])


def test_dense_code_holds_the_values_at_their_indices():
    code = make_sae().encode(make_resid())
    dense = code.to_dense()
    assert dense.shape == (4, 7, 24)
    assert torch.equal(dense.gather(-1, code.indices), code.values)
    assert torch.equal((dense > 0).sum(-1), (code.values > 0).sum(-1))


def test_decoding_by_hand():
    sae = make_sae(frame="layer")
    code, recon = sae(make_resid())
    framed = code.to_dense() @ sae.W_dec + sae.b_pre
    by_hand = framed * sae.frame.scale[:, None, None] + sae.frame.mean[:, None]
    torch.testing.assert_close(recon, by_hand)


def test_initial_decoder_is_the_encoder_with_unit_rows():
    sae = MLSAE(MLSAEConfig(d_model=16, n_latents=1000, k=4))
    torch.testing.assert_close(sae.W_dec, sae.W_enc / sae.W_enc.norm(dim=1, keepdim=True))
    assert sae.W_enc.abs().max() <= 0.25
    assert sae.W_enc.abs().mean().item() == pytest.approx(0.125, rel=0.05)
    assert not sae.b_pre.any()


# ---- groups and layers ----------------------------------------------------------------------------------------------


def test_one_group_is_the_mlsae():
    torch.manual_seed(0)
    plain = MLSAE(MLSAEConfig(d_model=6, n_latents=24, k=4, layers=LAYERS))
    torch.manual_seed(0)
    one = MLSAE(MLSAEConfig(d_model=6, n_latents=24, k=4, layers=LAYERS, groups=1))
    assert_same(one.state_dict(), plain.state_dict())
    (code, recon), (code_2, recon_2) = plain(make_resid()), one(make_resid())
    assert torch.equal(code.values, code_2.values)
    assert torch.equal(code.indices, code_2.indices)
    assert torch.equal(recon, recon_2)


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("groups", [2, 4])
def test_groups_are_separate_saes(frame, groups):
    sae, resid, size = make_sae(frame=frame, groups=groups).double(), make_resid().double(), len(LAYERS) // groups
    code, recon = sae(resid)
    for group in range(groups):
        here, latents = slice(group * size, (group + 1) * size), slice(group * 24, (group + 1) * 24)
        single = make_sae(frame=frame, layers=LAYERS[here]).double()
        with torch.no_grad():
            single.W_enc.copy_(sae.W_enc[latents])
            single.W_dec.copy_(sae.W_dec[latents])
            single.b_pre.copy_(sae.b_pre[group])
        if frame == "layer":
            single.frame.fit(sae.frame.mean[here], sae.frame.scale[here] ** 2)
        alone, alone_recon = single(resid[here])
        torch.testing.assert_close(alone.to_dense(), code.to_dense()[here][..., latents])
        torch.testing.assert_close(alone_recon, recon[here])


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("layers", [[5], [9, 1], [5, 1, 3], [9, 5, 3, 1]])
def test_a_subset_of_layers_is_part_of_the_whole(frame, groups, layers):
    """Layers are ids, in any order, of an SAE that was not trained on layers 0, 1, 2, ..."""
    sae, resid = make_sae(frame=frame, groups=groups, layers=(1, 3, 5, 9)).double(), make_resid().double()
    rows = [sae.layers.index(layer) for layer in layers]
    code, recon = sae(resid)
    part = sae.encode(resid[rows], layers=layers)
    torch.testing.assert_close(part.to_dense(), code.to_dense()[rows])
    torch.testing.assert_close(sae.decode(part), recon[rows])


def test_wrong_vectors_are_refused_in_words():
    sae = make_sae()
    with pytest.raises(ConfigError, match=r"resid: vectors have 5 entries; this SAE needs 6"):
        sae.rows(torch.zeros(4, 7, 5))
    with pytest.raises(ConfigError, match=r"resid: holds 3 layers where 4 are expected; .* layers 0, 1, 2, 3"):
        sae.encode(make_resid(n_layers=3))
    with pytest.raises(ConfigError, match=r"layers: 7 was not trained on; this SAE has layers 0, 1, 2, 3"):
        sae.encode(make_resid(n_layers=1), layers=[7])
    with pytest.raises(ConfigError, match="layers: -1 was not trained on"):
        sae.encode(make_resid(n_layers=1), layers=[-1])


def test_layers_are_unknown_until_set():
    sae = MLSAE(MLSAEConfig(d_model=6, n_latents=24, k=4))
    with pytest.raises(ConfigError, match="layers"):
        _ = sae.layers
    sae.set_layers(3)
    assert sae.layers == (0, 1, 2)
    assert sae.frame.scale.shape == sae.norm_limit.shape == (3,)


# ---- masks ----------------------------------------------------------------------------------------------------------


def test_a_token_over_the_limit_at_any_layer_is_not_visible():
    sae = make_sae()
    sae.norm_limit.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    resid = torch.zeros(4, 2, 3, 6)
    resid[0, 0, 0, 0] = 1.1
    resid[3, 1, 1, 0] = 4.1
    resid[2, 0, 2, 0] = 2.9  # within its own layer's limit
    keep = torch.ones(2, 3, dtype=torch.bool)
    keep[1, 2] = False
    assert (keep & sae.within_norm(resid.norm(dim=-1)).all(0)).tolist() == [[False, True, True], [True, False, False]]
    sae.norm_limit.fill_(torch.inf)
    assert sae.within_norm(resid.norm(dim=-1)).all()


@pytest.mark.parametrize("limit", [1e6, torch.inf])
def test_nan_is_not_hidden_by_the_limit_on_norms(limit):
    """A broken activation must reach the loss and stop the run (P7), not be masked away."""
    sae, resid = make_sae(), make_resid(batch=(1, 3))
    sae.norm_limit.fill_(limit)
    resid[2, 0, 1, 3] = torch.nan
    assert sae.within_norm(resid.norm(dim=-1)).all()


def test_masked_vectors_are_left_out_of_training_or_zeroed():
    visible = torch.tensor([[True, False, True], [False, False, True]])
    resid = make_resid(batch=(2, 3))
    none_over = torch.zeros(4, 2, 3, dtype=torch.bool)
    reading = Reading(
        torch.zeros(2, 3, dtype=torch.int64), resid, visible, resid[:, visible], none_over, resid.norm(dim=-1)
    )
    dropped = torch.stack([resid[:, 0, 0], resid[:, 0, 2], resid[:, 1, 2]], dim=1)
    assert torch.equal(reading.to_train(make_sae(special_tokens="drop")), dropped)
    zeroed = torch.where(visible[..., None], resid, 0).reshape(4, 6, 6)
    assert torch.equal(reading.to_train(make_sae(special_tokens="zero")), zeroed)


# ---- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_activations_stay_finite(frame, dtype):
    sae = make_sae(frame=frame).to(dtype)
    code, recon = sae((1e5 * make_resid()).to(dtype))
    assert recon.dtype == dtype
    assert code.values.isfinite().all()
    assert recon.isfinite().all()


def test_normalizing_the_decoder_leaves_zero_rows():
    sae = make_sae()
    sae.W_dec.data *= 7
    sae.W_dec.data[3] = 0
    sae.normalize_decoder_()
    norms = sae.W_dec.norm(dim=1)
    assert norms[3] == 0
    torch.testing.assert_close(torch.cat([norms[:3], norms[4:]]), torch.ones(23), rtol=0, atol=1e-6)


# ---- files ----------------------------------------------------------------------------------------------------------

CONFIG_KEYS = sorted(MLSAEConfig.model_fields)
TENSORS = ("W_enc", "W_dec", "b_pre", "norm_limit", "frame.mean", "frame.scale")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved")
    make_sae(lm="some/lm", lm_revision="abc", tokenizer_fingerprint="def").save_pretrained(path)
    return path


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "sae")


def change_config(folder, change):
    path = folder / CONFIG_FILE
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def change_tensors(folder, change):
    tensors, metadata = load_file(folder / WEIGHTS_FILE), tensors_metadata(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE, metadata)


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_load_gives_back_what_was_saved(tmp_path, frame, groups):
    sae, resid = make_sae(frame=frame, groups=groups, layers=(0, 2, 5, 7)), make_resid()
    sae.save_pretrained(tmp_path / "sae")
    loaded = MLSAE.from_pretrained(tmp_path / "sae")
    assert loaded.config == sae.config
    assert_same(loaded.state_dict(), sae.state_dict())
    assert torch.equal(loaded(resid)[1], sae(resid)[1])
    assert torch.equal(loaded.encode(resid).indices, sae.encode(resid).indices)
    assert loaded.encode(resid).indices.shape[-1] == sae.config.k


def test_an_infinite_norm_limit_is_saved_and_loaded(tmp_path):
    sae = make_sae()
    sae.norm_limit.fill_(torch.inf)
    sae.save_pretrained(tmp_path)
    assert MLSAE.from_pretrained(tmp_path).norm_limit.isinf().all()


@pytest.mark.parametrize("key", CONFIG_KEYS)
def test_a_missing_config_key_is_refused(folder, key):
    """A default in its place would be a different SAE that looks right."""
    change_config(folder, lambda values: values.pop(key))
    with pytest.raises(MlsaeError, match=rf"\b{key}\b"):
        MLSAE.from_pretrained(folder)


@pytest.mark.parametrize("key", CONFIG_KEYS)
def test_a_misspelt_config_key_is_refused(folder, key):
    change_config(folder, lambda values: values.update({f"{key}x": values.pop(key)}))
    with pytest.raises(MlsaeError, match=key):
        MLSAE.from_pretrained(folder)


@pytest.mark.parametrize("key", CONFIG_KEYS)
def test_a_config_value_of_the_wrong_type_is_refused(folder, key):
    change_config(folder, lambda values: values.update({key: {"a": 1}}))
    with pytest.raises(MlsaeError, match=key):
        MLSAE.from_pretrained(folder)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("d_model", 12, "n_latents"),
        ("n_latents", 48, "n_latents"),
        ("expansion_factor", 8.0, "n_latents"),
        ("groups", 2, "n_latents"),
        ("groups", 5, "groups"),
        ("layers", [0, 1, 2], r"key 'layers' is \[0, 1, 2\]; the weights were saved with"),
        ("layers", [0, 1, 1, 3], "layers"),
        ("layers", [0, 1, 2, -3], "layers"),
        ("frame", "vector", "frame"),
        ("frame", "other", "frame"),
        ("k", 25, "k"),
        ("k", 0, "k"),
        ("k", True, "k"),
        ("k", "4", "k"),
        ("activation", "relu", "activation"),
        ("format_version", 2, "format_version"),
        ("mask_norm_factor", 0.5, "mask_norm_factor"),
    ],
)
def test_an_impossible_config_is_refused(folder, key, value, named):
    change_config(folder, lambda values: values.update({key: value}))
    with pytest.raises(MlsaeError, match=named):
        MLSAE.from_pretrained(folder)


def test_an_absurd_size_is_refused_before_memory_is_asked_for(folder):
    sizes = {"n_latents": 6 * 10**12, "expansion_factor": 1e12}
    change_config(folder, lambda values: values.update(sizes))
    with pytest.raises(MlsaeError, match=r"W_enc|W_dec|n_latents|memory"):
        MLSAE.from_pretrained(folder)


def test_a_config_that_is_no_object_is_refused(folder):
    (folder / CONFIG_FILE).write_text("[1, 2]")
    with pytest.raises(MlsaeError):
        MLSAE.from_pretrained(folder)


@pytest.mark.parametrize("name", TENSORS)
def test_a_changed_tensor_is_refused(folder, name):
    whole = load_file(folder / WEIGHTS_FILE)[name]
    for changed in (
        {},
        {f"{name}x": whole},
        {name: whole[:-1].clone()},
        {name: whole[None].clone()},
    ):
        change_tensors(folder, lambda t, new=changed: (t.pop(name, None), t.pop(f"{name}x", None), t.update(new)))
        with pytest.raises(ModelError, match=name):
            MLSAE.from_pretrained(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_tensor_of_another_dtype_is_refused(folder, dtype):
    """N8: recast by somebody else, so no longer what was saved."""
    change_tensors(folder, lambda tensors: tensors.update(W_enc=tensors["W_enc"].to(dtype)))
    with pytest.raises(ModelError, match="W_enc"):
        MLSAE.from_pretrained(folder)


def test_an_unknown_tensor_is_refused(folder):
    change_tensors(folder, lambda tensors: tensors.update(b_enc=torch.zeros(24)))
    with pytest.raises(ModelError, match="b_enc"):
        MLSAE.from_pretrained(folder)


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_weights_that_are_not_finite_are_neither_saved_nor_loaded(folder, tmp_path, name, value):
    """One broken entry of any tensor, the limits among them: a NaN limit would mask every token."""
    sae = make_sae()
    sae.state_dict()[name].view(-1)[1] = value
    with pytest.raises(ModelError, match=name):
        sae.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new" / WEIGHTS_FILE).exists()
    change_tensors(folder, lambda tensors: tensors[name].view(-1)[1].fill_(value))
    with pytest.raises(ModelError, match=name):
        MLSAE.from_pretrained(folder)


def test_a_folder_without_an_sae_is_refused(tmp_path):
    with pytest.raises(ModelError, match="holds no SAE of a known format"):
        MLSAE.from_pretrained(tmp_path)
