"""Tuned lenses: their maps and inverses, published files, training, and SAEs that stand behind one."""

import json
import os
import signal
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import train_command
from mlsae import unpickler, untrusted
from mlsae.cli import main
from mlsae.config import MLSAEConfig, TrainConfig
from mlsae.data import TextSource, TokenBlocks
from mlsae.errors import ConfigError, ModelError, NumericsError
from mlsae.evaluate import evaluate
from mlsae.frames import Lens
from mlsae.lens import LensConfig, TunedLens, evaluate_lens, train_lens
from mlsae.lm import LanguageModel
from mlsae.metrics import kl_divergence
from mlsae.reading import read, text_blocks
from mlsae.sae import MLSAE
from mlsae.train import Loop, train
from mlsae.trainer import Trainer
from test_evaluate import perfect_sae
from tiny import ARCHITECTURES, byte_tokenizer, tiny_hf_model, tiny_lm

N_LAYERS, D_MODEL, CONTEXT = 3, 32, 64
LAYERS = (0, 1, 2)


def random_lens(size: float = 0.3, seed: int = 1, last: bool = False, n_layers: int = N_LAYERS) -> TunedLens:
    """A lens of seeded random maps; that of the last layer is the identity, as it should be, unless asked otherwise."""
    lens = TunedLens(LensConfig(d_model=D_MODEL, n_layers=n_layers))
    generator = torch.Generator().manual_seed(seed)
    lens.weight.copy_(size * torch.randn(lens.weight.shape, generator=generator) / D_MODEL**0.5)
    lens.bias.copy_(torch.randn(lens.bias.shape, generator=generator))
    if not last:
        lens.weight[-1], lens.bias[-1] = 0.0, 0.0
    return lens


def behind(lens: Lens | None, sae: MLSAE) -> MLSAE:
    """The same SAE with `lens` before its frame."""
    made = MLSAE(sae.config.replaced(lens=None if lens is None else "somewhere"))
    made.load_state_dict(sae.state_dict(), strict=False)
    if lens is not None:
        made.set_lens(lens)
    return made


def an_sae(frame: str = "layer", **changes: Any) -> MLSAE:
    """An SAE of the tiny model's shape with nothing about it special."""
    config = {"d_model": D_MODEL, "n_latents": 96, "k": 5, "frame": frame, "layers": LAYERS, **changes}
    sae = MLSAE(MLSAEConfig(**config))
    sae.b_pre.data.normal_()
    if frame == "layer":
        sae.frame.fit(torch.randn(len(sae.layers), D_MODEL), torch.rand(len(sae.layers)) + 0.5)
    return sae


@pytest.fixture(scope="module")
def text(lm: LanguageModel, corpus: Path) -> TokenBlocks:
    return text_blocks(lm, TextSource(str(corpus), "train"), tokens=1, context_length=CONTEXT, progress=False)


@pytest.fixture(scope="module")
def held_out(lm: LanguageModel, corpus: Path) -> TokenBlocks:
    return text_blocks(lm, TextSource(str(corpus), "validation"), tokens=1, context_length=CONTEXT, progress=False)


@pytest.fixture(scope="module")
def resid(lm: LanguageModel, text: TokenBlocks) -> torch.Tensor:
    """Every layer's vectors of 512 tokens."""
    return lm.resid(text.read(0, 8)).flatten(1, 2)


# ---- the maps --------------------------------------------------------------------------------------------------------


def test_a_zero_lens_changes_no_bit(resid: torch.Tensor):
    lens = TunedLens(LensConfig(d_model=D_MODEL, n_layers=N_LAYERS))
    assert torch.equal(lens.apply_to(resid), resid)
    assert torch.equal(lens.invert(resid), resid)
    assert lens.condition_numbers.tolist() == [1.0] * 3


def test_a_map_and_its_inverse_by_hand():
    """I + A = [[1, 1], [0, 1]] takes (1, 2) to (3, 2); with c = (10, 20), to (13, 22)."""
    lens = Lens((7,), 2)
    lens.weight.copy_(torch.tensor([[[0.0, 1.0], [0.0, 0.0]]]))
    x = torch.tensor([[[1.0, 2.0]]])
    assert lens.apply_to(x).tolist() == [[[3.0, 2.0]]]
    assert lens.invert(torch.tensor([[[3.0, 2.0]]])).tolist() == x.tolist()
    lens.bias.copy_(torch.tensor([[10.0, 20.0]]))
    assert lens.apply_to(x).tolist() == [[[13.0, 22.0]]]
    assert lens.invert(lens.apply_to(x)).tolist() == x.tolist()
    golden = (1 + 5**0.5) / 2
    assert lens.condition_numbers.item() == pytest.approx(golden**2)


@pytest.mark.parametrize("size", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("layers", [None, (2, 0), (1,)])
def test_the_inverse_undoes_the_map(resid: torch.Tensor, size: float, layers: tuple[int, ...] | None):
    """To a hundred roundings of float32 times the condition number, and far within 1e-4 where that is moderate."""
    lens = random_lens(size, last=True)
    x = resid if layers is None else resid[list(layers)]
    error = (lens.invert(lens.apply_to(x, layers), layers) - x).norm(dim=-1) / x.norm(dim=-1)
    assert error.max() < 100 * 2**-24 * lens.condition_numbers.max()
    assert size > 1 or error.max() < 1e-4


def test_the_map_is_the_equation(resid: torch.Tensor):
    """In float64, a vector at a time; axes between layer and d_model may be any."""
    lens = random_lens(1.0, last=True)
    want = torch.stack(
        [
            torch.stack([x + A @ x + c for x in rows])
            for A, c, rows in zip(lens.weight.double(), lens.bias.double(), resid[:, :16].double(), strict=True)
        ]
    )
    got = lens.apply_to(resid[:, :16].unflatten(1, (2, 8)))
    torch.testing.assert_close(got.flatten(1, 2).double(), want, rtol=1e-5, atol=1e-5)


def test_an_inverse_does_not_outlive_its_map(resid: torch.Tensor):
    """It is kept, and made anew when the weights change in place, are loaded or move."""
    lens, other = random_lens(seed=1), random_lens(seed=2)
    lens.invert(resid)
    assert lens._inverses() is lens._inverses()
    lens.load_state_dict(other.state_dict())
    assert torch.equal(lens.invert(resid), other.invert(resid))
    lens.weight[0] *= 2
    assert not torch.equal(lens.invert(resid)[0], other.invert(resid)[0])


@pytest.mark.parametrize(("factor", "layer"), [(-1.0, 1), (-1.0 + 1e-8, 2)])
def test_a_map_that_loses_vectors_is_refused_by_its_layer(resid: torch.Tensor, factor: float, layer: int):
    """A = -I takes everything to c; one direction is enough."""
    lens = random_lens()
    lens.weight[layer] = 0.0
    lens.weight[layer, 3, 3] = factor
    with pytest.raises(ModelError, match=f"lens: the translator of layer {layer} is singular"):
        lens.invert(resid)
    with pytest.raises(ModelError, match=f"layer {layer} is singular"):
        behind(lens, an_sae())


def test_what_a_lens_has_not_is_refused(resid: torch.Tensor):
    lens = random_lens()
    with pytest.raises(ConfigError, match="-1 has no translator"):
        lens.apply_to(resid[:1], [-1])
    with pytest.raises(ConfigError, match="the lens needs 3 layers of 32"):
        lens.apply_to(resid[:2])
    with pytest.raises(ConfigError, match="the lens needs 1 layers of 32"):
        lens.invert(resid[:1, :, :8], [0])


# ---- unembedding -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_unembedding_the_last_layer_gives_the_logits(architecture: str):
    lm = tiny_lm(architecture)
    tokens = torch.arange(24).view(2, 12) * 5 % 256
    torch.testing.assert_close(lm.unembed(lm.resid(tokens)[-1]), lm.logits(tokens), rtol=1e-5, atol=1e-5)


def test_unembedding_is_differentiable():
    lm = tiny_lm("gpt_neox", n_layers=2, d_model=8)
    lm.hf.double()
    resid = torch.randn(1, 2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: lm.unembed(x)[..., ::40], resid)


# ---- training --------------------------------------------------------------------------------------------------------


def planted_lm(A: torch.Tensor, c: torch.Tensor) -> LanguageModel:
    """A model whose block 1 is `x + x A^T + c` and whose block 2 does nothing."""
    hf = tiny_hf_model(n_layers=3)
    hf.model.layers[1].forward = lambda hidden_states, *args, **kw: hidden_states + hidden_states @ A.T + c
    hf.model.layers[2].forward = lambda hidden_states, *args, **kw: hidden_states
    return LanguageModel(hf, byte_tokenizer(), name="planted")


@pytest.fixture(scope="module")
def planted() -> tuple[LanguageModel, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    A = 3 * torch.randn(D_MODEL, D_MODEL, generator=generator) / D_MODEL**0.5
    c = torch.randn(D_MODEL, generator=generator)
    return planted_lm(A, c), A, c


def test_training_finds_the_map_that_the_next_block_is(planted, text: TokenBlocks, held_out: TokenBlocks):
    """At its own layer, and not at the one after or before: layer 1, whose output is the last one's, needs none."""
    lm, *_ = planted
    lens = train_lens(lm, text, tokens=5_000, lr=0.03, progress=False)
    found = evaluate_lens(lens, lm, held_out, progress=False).layers
    assert found[0]["logit_lens_kl"] > 1
    assert found[0]["tuned_lens_kl"] < 0.1 * found[0]["logit_lens_kl"]
    assert max(found[1]["logit_lens_kl"], found[1]["tuned_lens_kl"]) < 1e-3


def test_training_helps_every_layer_and_leaves_the_last(lm: LanguageModel, text: TokenBlocks, held_out: TokenBlocks):
    lens = train_lens(lm, text, tokens=2_000, lr=0.02, progress=False)
    quality = evaluate_lens(lens, lm, held_out, progress=False)
    for row in quality.layers[:-1]:
        assert row["tuned_lens_kl"] < 0.9 * row["logit_lens_kl"], row
    assert (lens.weight[-1] == 0).all()
    assert (lens.bias[-1] == 0).all()
    assert quality.layers[-1] == {"layer": 2, "logit_lens_kl": 0.0, "tuned_lens_kl": 0.0, "condition_number": 1.0}
    tokens = held_out.read(0, len(held_out), order="file")
    assert quality.n_tokens == int(lm.keep_mask(tokens).sum())
    with torch.no_grad():  # the whole table at once, for once
        keep, stream = lm.keep_mask(tokens), lens.apply_to(lm.resid(tokens).flatten(1, 2))[0].view(*tokens.shape, -1)
        clean, through = (x.double().log_softmax(-1) for x in (lm.logits(tokens), lm.unembed(stream)))
    assert quality.layers[0]["tuned_lens_kl"] == pytest.approx(
        kl_divergence(clean, through)[keep].mean().item(), rel=1e-5
    )


def test_training_repeats_bit_for_bit_in_any_size_of_table(lm: LanguageModel, text: TokenBlocks, monkeypatch):
    """The order of the text is the seed's; how many logits are held at once only rounds differently."""
    first, same, other = (train_lens(lm, text, tokens=320, seed=seed, progress=False) for seed in (0, 0, 1))
    assert torch.equal(first.weight, same.weight)
    assert not torch.equal(first.weight, other.weight)
    monkeypatch.setattr("mlsae.lens.LOGITS", 7 * lm.d_vocab)
    parts = train_lens(lm, text, tokens=320, seed=0, progress=False)
    torch.testing.assert_close(parts.weight, first.weight, rtol=1e-2, atol=1e-4)


def test_a_step_that_is_not_finite_stops_the_training(text: TokenBlocks):
    lm = tiny_lm()
    lm.hf.lm_head.weight.data[5] = torch.nan
    with pytest.raises(NumericsError, match="loss: nan at step 1 of the lens"):
        train_lens(lm, text, tokens=640, progress=False)


# ---- files -----------------------------------------------------------------------------------------------------------


def test_a_saved_lens_is_the_same_lens(tmp_path: Path, lm: LanguageModel):
    lens = random_lens(last=True)
    lens.save(tmp_path)
    back = TunedLens.load(tmp_path, lm)
    assert back.config == lens.config
    assert all(torch.equal(tensor, lens.state_dict()[name]) for name, tensor in back.state_dict().items())


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pickles are read in this process, which saves the start of another; tests of what that one is for do without."""

    def unpickle(path: Path, folder: Path, max_bytes: int) -> None:
        unpickler.write_answer(folder, max_bytes, lambda: torch.load(path, weights_only=True))

    monkeypatch.setattr(untrusted, "_unpickle", unpickle)


def published(folder: Path, lens: TunedLens, **config: Any) -> Path:
    """The folder that the tuned-lens library would have written, translator i for the input of block i."""
    folder.mkdir(exist_ok=True)
    size = {"base_model_name_or_path": "someone/tiny-llama", "d_model": D_MODEL, "num_hidden_layers": N_LAYERS}
    (folder / "config.json").write_text(json.dumps({**size, "bias": True, "lens_type": "linear_tuned_lens", **config}))
    weights, biases = lens.weight.roll(1, 0), lens.bias.roll(1, 0)
    weights[0], biases[0] = 9.0, 9.0  # the embeddings' translator, which no layer's output has a use for
    state = {f"{i}.weight": weights[i].clone() for i in range(N_LAYERS)}
    state |= {f"{i}.bias": biases[i].clone() for i in range(N_LAYERS)}
    torch.save(state, folder / "params.pt")
    return folder


def test_a_published_translator_belongs_to_the_input_of_its_block(tmp_path: Path, planted, here: None):
    """Translator 1 is the planted block 1: on what block 0 puts out, it makes what block 1 does. Not so for lawson2024 (D15)."""
    lm, A, c = planted
    lens = TunedLens(LensConfig(d_model=D_MODEL, n_layers=N_LAYERS))
    lens.weight[0], lens.bias[0] = A, c
    folder = published(tmp_path / "tiny", lens, base_model_name_or_path="planted")
    stream = lm.resid(torch.arange(20).view(1, 20)).flatten(1, 2)
    right = TunedLens.load(folder, lm, allow_pickle=True)
    torch.testing.assert_close(right.apply_to(stream), stream[[1, 1, 2]], rtol=1e-5, atol=1e-5)
    published2024 = TunedLens.load(folder, lm, allow_pickle=True, alignment="lawson2024")
    assert torch.equal(published2024.weight[1], A)
    assert (published2024.weight[0] == 9).all()


def test_a_published_lens_goes_by_name_or_by_its_unembedding(tmp_path: Path, lm: LanguageModel, caplog, here: None):
    from mlsae.lens import _unembed_hash

    lens = random_lens()
    assert TunedLens.load(published(tmp_path / "a", lens), lm, allow_pickle=True).config.lm == "someone/tiny-llama"
    stranger = published(tmp_path / "b", lens, base_model_name_or_path="someone/else")
    with pytest.raises(ModelError, match="is a lens of 'someone/else', not of"):
        TunedLens.load(stranger, lm, allow_pickle=True)
    assert torch.equal(TunedLens.load(stranger, allow_pickle=True).weight, lens.weight)
    known = published(tmp_path / "c", lens, base_model_name_or_path="someone/else", unembed_hash=_unembed_hash(lm))
    assert torch.equal(TunedLens.load(known, lm, allow_pickle=True).weight, lens.weight)
    assert caplog.text == ""
    TunedLens.load(published(tmp_path / "d", lens, unembed_hash="0" * 64), lm, allow_pickle=True)
    assert "another unembedding" in caplog.text


def test_a_pickle_is_read_on_request_only_and_only_for_tensors(tmp_path: Path, lm: LanguageModel):
    folder = published(tmp_path / "lens", random_lens())
    with pytest.raises(ModelError, match=r"published lenses are pickles.*allow_pickle=True"):
        TunedLens.load(folder, lm)

    class Gadget:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "canary"),)

    torch.save({"0.weight": Gadget()}, folder / "params.pt")
    with pytest.raises(ModelError, match="holds more than tensors"):
        TunedLens.load(folder, lm, allow_pickle=True)
    assert not (tmp_path / "canary").exists()
    torch.load(folder / "params.pt", weights_only=False)  # it would have gone off
    assert (tmp_path / "canary").exists()


def damaged(folder: Path, kind: str) -> None:
    """Break a published lens in one way."""
    params = folder / "params.pt"
    state = torch.load(params)
    if kind == "missing":
        del state["1.bias"]
    elif kind == "unknown":
        state["3.weight"] = state["2.weight"]
    elif kind == "shape":
        state["1.weight"] = state["1.weight"][:, :-1]
    elif kind == "type":
        state["1.weight"] = state["1.weight"].int()
    elif kind == "NaN":
        state["1.weight"][2, 2] = torch.nan
    elif kind == "singular":
        state["1.weight"] = -torch.eye(D_MODEL)
    elif kind == "list":
        state = list(state.values())
    torch.save(state, params)
    if kind == "cut":
        params.write_bytes(params.read_bytes()[:5000])
    if kind == "bomb":
        with zipfile.ZipFile(params, "a", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data/99", bytes(10_000_000))


@pytest.mark.parametrize(
    ("kind", "words"),
    {
        "missing": "'1.bias' is missing or unknown",
        "unknown": "'3.weight' is missing or unknown",
        "shape": r"'1.weight' has shape \[32, 31\]",
        "type": "'1.weight' is no tensor of floating-point",
        "NaN": "NaN or infinity",
        "singular": "translator of layer 0 is singular",
        "list": "holds a list where a dictionary of tensors should be",
        "cut": "holds more than tensors, or is damaged",
        "bomb": r"holds \d+ bytes; at most \d+ are read",
    }.items(),
)
def test_a_damaged_published_lens_is_refused(tmp_path: Path, lm: LanguageModel, here: None, kind: str, words: str):
    folder = published(tmp_path / "lens", random_lens())
    damaged(folder, kind)
    with pytest.raises(ModelError, match=words):
        TunedLens.load(folder, lm, allow_pickle=True)


def test_the_lens_of_another_model_is_refused(tmp_path: Path, lm: LanguageModel):
    random_lens(n_layers=4).save(tmp_path / "a")
    with pytest.raises(ModelError, match=r"4 layers of 32 entries; .* has 3 of 32"):
        TunedLens.load(tmp_path / "a", lm)
    lens = random_lens()
    lens.config = lens.config.replaced(tokenizer_fingerprint="0" * 64)
    lens.save(tmp_path / "b")
    with pytest.raises(ModelError, match="another tokenizer"):
        TunedLens.load(tmp_path / "b", lm)
    (tmp_path / "c").mkdir()
    with pytest.raises(ModelError, match=r"holds no lens.safetensors"):
        TunedLens.load(tmp_path / "c", lm)
    with pytest.raises(ModelError, match="holds neither"):
        TunedLens.load(tmp_path / "c", lm, allow_pickle=True)


def test_our_file_is_checked_against_what_it_says(tmp_path: Path):
    lens = random_lens()
    lens.save(tmp_path)
    file = tmp_path / "lens.safetensors"
    tensors = load_file(file)
    save_file(tensors, file)
    with pytest.raises(ModelError, match="does not say what it belongs to"):
        TunedLens.load(tmp_path)
    lens.config = lens.config.replaced(n_layers=2)
    lens.save(tmp_path)
    with pytest.raises(ModelError, match=r"config.json needs"):
        TunedLens.load(tmp_path)


# ---- SAEs behind a lens ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frame", ["layer", "vector", "none"])
def test_an_sae_behind_a_zero_lens_is_the_sae(resid: torch.Tensor, frame: str):
    sae = an_sae(frame)
    other = behind(TunedLens(LensConfig(d_model=D_MODEL, n_layers=N_LAYERS)), sae)
    for field in ("values", "indices", "shift", "scale"):
        assert torch.equal(getattr(sae.encode(resid), field), getattr(other.encode(resid), field))
    assert torch.equal(sae(resid)[1], other(resid)[1])


@pytest.mark.parametrize("frame", ["layer", "vector", "none"])
@pytest.mark.parametrize("layers", [None, (2, 0)])
def test_the_lens_comes_first_and_its_inverse_last(resid: torch.Tensor, frame: str, layers: tuple[int, ...] | None):
    """An SAE behind a lens is the SAE without one, on lensed vectors; what it decodes is back in the residual stream."""
    lens, sae = random_lens(), an_sae(frame)
    lensed_sae, x = behind(lens, sae), resid if layers is None else resid[list(layers)]
    code, want = lensed_sae.encode(x, layers), sae.encode(lens.apply_to(x, layers), layers)
    assert torch.equal(code.values, want.values)
    assert torch.equal(code.indices, want.indices)
    recon = lensed_sae.decode(code)
    assert torch.equal(recon, lens.invert(sae.decode(want), layers))
    torch.testing.assert_close(lens.apply_to(recon, layers), lensed_sae.decode_lensed(code), rtol=1e-4, atol=1e-4)


def test_an_sae_of_some_layers_has_their_maps(resid: torch.Tensor):
    lens = random_lens()
    sae = behind(lens, an_sae(layers=(2, 0)))
    assert torch.equal(sae.lensed(resid[[2, 0]]), lens.apply_to(resid[[2, 0]], (2, 0)))
    assert torch.equal(sae.lensed(resid[[0]], [0]), lens.apply_to(resid[[0]], (0,)))
    with pytest.raises(ModelError, match="lens: has no layer 3, but 0, 1, 2"):
        behind(lens, an_sae(layers=(3,)))
    with pytest.raises(ConfigError, match="made without one"):
        an_sae().set_lens(lens)


def test_a_saved_sae_needs_no_lens_beside_it(tmp_path: Path, resid: torch.Tensor):
    sae = behind(random_lens(), an_sae())
    sae.save_pretrained(tmp_path)
    back = MLSAE.from_pretrained(tmp_path)
    assert back.config.lens == "somewhere"
    assert torch.equal(back(resid)[1], sae(resid)[1])
    assert not torch.equal(back(resid)[1], behind(None, sae)(resid)[1])


@pytest.mark.parametrize("recipe", ["standard", "lawson2024"])
def test_training_takes_place_behind_the_lens(resid: torch.Tensor, recipe: str):
    """Steps on raw vectors are those of an SAE without a lens on lensed ones; norm limits are the residual stream's."""
    lens = random_lens()
    norm = None if recipe == "lawson2024" else 10.0
    plain = an_sae("vector" if norm is None else "layer", recipe=recipe, mask_norm_factor=norm)
    saes = behind(lens, plain), plain
    losses = []
    for sae, vectors in zip(saes, (resid, lens.apply_to(resid)), strict=True):
        trainer = Trainer(sae)
        losses.append([trainer.step(vectors).loss for _ in range(3)])
    assert losses[0] == losses[1]
    for name in ("W_enc", "W_dec", "b_pre"):
        assert torch.equal(getattr(saes[0], name), getattr(saes[1], name))
    if norm is not None:
        torch.testing.assert_close(saes[0].norm_limit, 10 * resid.norm(dim=-1).median(1).values)
    assert torch.equal(saes[0].lens.weight, lens.weight)


def test_a_perfect_dictionary_behind_a_lens_loses_nothing(lm: LanguageModel, held_out: TokenBlocks):
    """In the language model too, because what is spliced in went through the inverse."""
    found = evaluate(behind(random_lens(1.0), perfect_sae()), lm, held_out, tokens=256, progress=False)
    for name in ("fvu", "mse", "lens_fvu", "lens_mse", "delta_ce", "kl"):
        assert [row[name] for row in found.layers] == pytest.approx([0.0] * 3, abs=1e-6), name
    assert found.all_layers["kl"] == pytest.approx(0.0, abs=1e-6)


def test_quality_is_measured_on_both_sides_of_the_lens(lm: LanguageModel, held_out: TokenBlocks):
    lens, sae = random_lens(1.0), an_sae()
    lensed_sae = behind(lens, sae)
    found = evaluate(lensed_sae, lm, held_out, tokens=256, splice_tokens=64, progress=False)
    x = read(lm, lensed_sae, held_out.read(0, 4)).vectors.double()
    recon = lensed_sae(x.float())[1].double()
    sides = {"": (x, recon), "lens_": (lens.apply_to(x.float()).double(), lens.apply_to(recon.float()).double())}
    for prefix, (true, made) in sides.items():
        error = (true - made).square()
        want = error.sum((1, 2)) / (true - true.mean(1, keepdim=True)).square().sum((1, 2))
        assert [row[f"{prefix}fvu"] for row in found.layers] == pytest.approx(want.tolist(), rel=1e-4)
        assert [row[f"{prefix}mse"] for row in found.layers] == pytest.approx(error.mean((1, 2)).tolist(), rel=1e-4)
    published = [row["mse"] for row in found.lawson2024["layers"]]
    n_read, n_seen = 256, x.shape[1]
    assert published == pytest.approx([row["lens_mse"] * n_seen / n_read for row in found.layers], rel=1e-4)
    assert "lens_fvu" not in evaluate(sae, lm, held_out, tokens=64, progress=False).layers[0]


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lens_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lens")
    random_lens().save(folder)
    return folder


def test_a_run_behind_a_lens_goes_on_bit_for_bit_without_its_folder(
    tmp_path, lm_folder, corpus, lens_folder, monkeypatch
):
    whole, parts, moved = tmp_path / "whole", tmp_path / "parts", tmp_path / "lens"
    moved.mkdir()
    (moved / "lens.safetensors").write_bytes((lens_folder / "lens.safetensors").read_bytes())

    def command(out: Path) -> list[str]:
        flags = ("--lens", str(moved), "--validate-every-steps", "5", "--validation-sequences", "4")
        return train_command(*flags, lm=lm_folder, data=corpus, out=out)

    assert main(command(whole)) == 0
    step = Loop._step

    def stopping(loop: Loop) -> Any:
        if loop.trainer.steps == 6:
            signal.raise_signal(signal.SIGTERM)
        return step(loop)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_step", stopping)
        assert main(command(parts)) == 75
    moved.rename(tmp_path / "gone")
    assert main([*command(parts), "--resume"]) == 0
    for name in ("sae/model.safetensors", "sae/config.json"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes()
    sae = MLSAE.from_pretrained(whole)
    assert torch.equal(sae.lens.weight, random_lens().weight)
    assert sae.config.lens == str(moved)


def test_a_run_behind_a_lens_can_be_judged_and_read(tmp_path, lm, corpus, lens_folder):
    from mlsae.analyze import analyze

    config = {"k": 4, "expansion_factor": 2.0, "tokens": 1000, "init_tokens": 512, "lens": str(lens_folder)}
    run = train(TrainConfig(lm=lm.name, data=str(corpus), out=str(tmp_path / "run"), **config), lm=lm, progress=False)
    found = evaluate(run.sae, lm, str(corpus), tokens=300, progress=False)
    assert 0 < found.mean["lens_fvu"] < 2
    assert analyze(run.sae, lm, str(corpus), tokens=300, progress=False).statistics.n_tokens > 0
    vectors = read(lm, run.sae, torch.arange(64).view(1, 64)).vectors
    assert torch.equal(
        run.sae.encode(vectors).indices, behind(None, run.sae).encode(random_lens().apply_to(vectors)).indices
    )


def test_a_lens_that_is_not_there_costs_no_run(tmp_path, lm_folder, corpus, capsys):
    command = train_command("--lens", str(tmp_path / "none"), lm=lm_folder, data=corpus, out=tmp_path / "run")
    assert main(command) == 6
    assert "holds no lens.safetensors" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_command_trains_a_lens_and_names_the_next(tmp_path, lm_folder, corpus, capsys):
    out = tmp_path / "lens"
    flags = ["--lm", str(lm_folder), "--data", str(corpus), "--out", str(out), "--quiet", "--tokens", "320"]
    assert main(["lens", *flags, "--json", str(tmp_path / "copy.json")]) == 0
    printed = capsys.readouterr().out
    assert "logit-lens KL  tuned-lens KL" in printed
    assert f"Next: mlsae train --lm {lm_folder} --data {corpus} --out RUN --lens {out}" in printed
    assert TunedLens.load(out).config.tokens == 320
    quality = json.loads((out / "quality.json").read_text())
    assert [row["layer"] for row in quality["layers"]] == [0, 1, 2]
    assert json.loads((tmp_path / "copy.json").read_text()) == quality


def test_the_command_reads_rows_as_train_does_and_says_so_again(tmp_path, lm_folder, corpus, capsys):
    """The same documents in another column, with a row that is none, give the same lens."""
    stories = tmp_path / "stories"
    stories.mkdir()
    for file in corpus.iterdir():
        rows = [json.dumps({"story": json.loads(line)["text"]}) for line in file.read_text().splitlines()]
        (stories / file.name).write_text("\n".join([*rows, '{"story": 5}', ""]))
    for data, flags in ((corpus, ()), (stories, ("--text-column", "story", "--skip-bad-rows"))):
        named = ["--lm", str(lm_folder), "--data", str(data), *flags, "--split", "test"]
        assert main(["lens", *named, "--out", str(tmp_path / data.name), "--quiet", "--tokens", "320"]) == 0
    said = f"Next: mlsae train --lm {lm_folder} --data {stories} --split test --text-column story --skip-bad-rows --out"
    assert said in capsys.readouterr().out
    assert (tmp_path / "stories/quality.json").read_text() == (tmp_path / corpus.name / "quality.json").read_text()
    assert main(["lens", *named[:4], "--out", str(tmp_path / "none"), "--quiet"]) == 3
    assert "story" in capsys.readouterr().err


def test_the_command_takes_a_published_lens_as_it_is(tmp_path, lm_folder, corpus, capsys):
    folder, out = published(tmp_path / "published", random_lens()), tmp_path / "lens"
    flags = ["--lm", str(lm_folder), "--data", str(corpus), "--out", str(out), "--quiet", "--published", str(folder)]
    assert main(["lens", *flags]) == 0
    assert torch.equal(TunedLens.load(out).weight, random_lens().weight)
