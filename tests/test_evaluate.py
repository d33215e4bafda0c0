"""Evaluation: the identities every metric keeps, each number by hand, and nothing changed by looking."""

import contextlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from conftest import train_command
from mlsae import heldout, losses, metrics
from mlsae.cli import main
from mlsae.config import MLSAEConfig
from mlsae.data import TokenBlocks, pack
from mlsae.errors import ConfigError, DataError, ModelError
from mlsae.evaluate import Evaluation, evaluate, splice_with
from mlsae.files import finite
from mlsae.intervals import jackknife
from mlsae.lm import LanguageModel
from mlsae.reading import read
from mlsae.sae import MLSAE
from mlsae.text import TextSource
from mlsae.tokens import Tokenizer
from tiny import byte_tokenizer

D_MODEL, CONTEXT, LAYERS = 32, 32, (0, 1, 2)
SETTINGS = {"tokens": 10**6, "progress": False}


@pytest.fixture(scope="module")
def blocks(lm: LanguageModel, corpus: Path) -> TokenBlocks:
    """Eight blocks of held-out text with separators inside."""
    found = pack(TextSource(str(corpus), "test"), lm.tokenizer, CONTEXT, progress=False)
    assert len(found) >= 8
    return TokenBlocks(found._tokens[:8], found.document_starts, found.info)


def make_sae(layers=LAYERS, *, cls=MLSAE, k=4, seed=1, **changes) -> MLSAE:
    """A random SAE in the `layer` frame, whose mean and scale go with the layer's id, so that mixed-up layers show."""
    torch.manual_seed(seed)
    shape = {"d_model": D_MODEL, "n_latents": 96, "k": k, "layers": layers, "mask_norm_factor": None}
    sae = cls(MLSAEConfig(**shape | changes))
    if sae.config.frame == "layer":
        means = torch.randn(8, D_MODEL, generator=torch.Generator().manual_seed(5))
        sae.frame.fit(means[list(layers)], torch.tensor([(1.0 + layer) ** 2 for layer in layers]))
    return sae


def perfect_sae(layers=LAYERS) -> MLSAE:
    """W = [I; -I] and k = n: the code holds the positive and the negative part of the vector, nothing is lost."""
    sae = MLSAE(
        MLSAEConfig(
            d_model=D_MODEL, n_latents=2 * D_MODEL, k=2 * D_MODEL, frame="none", layers=layers, mask_norm_factor=None
        )
    )
    identity = torch.eye(D_MODEL)
    for weight in (sae.W_enc, sae.W_dec):
        weight.data = torch.cat([identity, -identity])
    sae.b_pre.data.zero_()
    return sae


class Mean(MLSAE):
    """Reconstructs every vector as its layer's mean."""

    means: torch.Tensor

    def decode(self, code):
        mean = self.means[list(code.rows)].view(len(code.rows), *[1] * (code.values.ndim - 2), -1)
        return mean.expand(*code.values.shape[:-1], -1)


def all_tokens(blocks: TokenBlocks) -> torch.Tensor:
    return blocks.read(0, len(blocks), order="file")


def column(evaluation, name: str) -> list[float]:
    return [row[name] for row in evaluation.layers]


def quality(evaluation) -> dict[int, dict[str, float]]:
    return {row["layer"]: {key: value for key, value in row.items() if key != "layer"} for row in evaluation.layers}


# ---- identities ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [LAYERS, (1,), (2, 0)])
def test_a_perfect_sae_loses_nothing(lm: LanguageModel, blocks: TokenBlocks, layers: tuple[int, ...]):
    found = evaluate(perfect_sae(layers), lm, blocks, **SETTINGS)
    for name in ("fvu", "mse", "delta_ce", "kl"):
        assert column(found, name) == [0.0] * len(layers), name
    assert found.all_layers == {"delta_ce": 0.0, "kl": 0.0}
    assert column(found, "cosine") == pytest.approx([1.0] * len(layers), abs=1e-6)
    assert column(found, "norm_ratio") == pytest.approx([1.0] * len(layers), abs=1e-6)
    assert column(found, "l0") == pytest.approx([D_MODEL] * len(layers))


def test_predicting_the_layer_mean_has_fvu_1(lm: LanguageModel, blocks: TokenBlocks):
    sae = make_sae(cls=Mean, frame="none")
    sae.means = read(lm, sae, all_tokens(blocks)).vectors.double().mean(1).float()
    found = evaluate(sae, lm, blocks, **SETTINGS)
    assert column(found, "fvu") == pytest.approx([1.0] * 3, abs=1e-6)
    assert min(column(found, "kl")) > 0


@pytest.mark.parametrize("n_blocks", [1, 8])
def test_clean_ce_is_the_models_own_loss(lm: LanguageModel, blocks: TokenBlocks, n_blocks: int):
    tokens = blocks.read(0, n_blocks)
    want = lm.hf(input_ids=tokens, labels=tokens).loss.item()
    found = evaluate(make_sae(), lm, blocks, tokens=n_blocks * CONTEXT, progress=False)
    assert found.clean_ce == pytest.approx(want, rel=1e-6)


def test_neither_batch_size_nor_order_matters(lm, blocks, monkeypatch: pytest.MonkeyPatch):
    sae, seen = make_sae(), []
    for batch_tokens, order in ((CONTEXT, 1), (3 * CONTEXT, -1), (10**6, 1)):
        monkeypatch.setattr(heldout, "BATCH_TOKENS", batch_tokens)
        shuffled = TokenBlocks(blocks._tokens[::order], blocks.document_starts, blocks.info)
        seen.append(evaluate(sae, lm, shuffled, **SETTINGS))
    for other in seen[1:]:
        for key in ("n_tokens", "n_spliced_tokens", "masked_by_norm", "dead_fraction"):
            assert getattr(other, key) == getattr(seen[0], key)
        assert other.clean_ce == pytest.approx(seen[0].clean_ce, rel=1e-6)
        assert other.all_layers == pytest.approx(seen[0].all_layers, abs=2e-6)
        assert other.mean == pytest.approx(seen[0].mean, abs=2e-6)
        for row, first in zip(other.layers, seen[0].layers, strict=True):
            assert row == pytest.approx(first, abs=2e-6)


@pytest.mark.parametrize("layers", [(0, 2), (2,), (0,), (2, 0)])
def test_a_subset_means_model_layers(lm: LanguageModel, blocks: TokenBlocks, layers: tuple[int, ...]):
    """N3: every metric of a layer is what the SAE on all layers has there."""
    whole, part = (
        quality(evaluate(make_sae(), lm, blocks, **SETTINGS)),
        evaluate(make_sae(layers), lm, blocks, **SETTINGS),
    )
    assert column(part, "layer") == list(layers)
    for layer, row in quality(part).items():
        assert row == pytest.approx(whole[layer], abs=1e-6)
    assert len({whole[layer]["fvu"] for layer in LAYERS}) == 3  # else the test shows nothing


def test_all_layers_of_one_layer_is_that_layer(lm: LanguageModel, blocks: TokenBlocks):
    for layer in LAYERS:
        found = evaluate(make_sae((layer,)), lm, blocks, **SETTINGS)
        want = {name: found.layers[0][name] for name in ("delta_ce", "kl")}
        assert found.all_layers == pytest.approx(want, abs=1e-6)


# ---- by hand ---------------------------------------------------------------------------------------------------------


def spliced_by_hand(
    lm: LanguageModel, sae: MLSAE, tokens: torch.Tensor, layer: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clean log-probabilities, and those after `layer` is replaced at unmasked positions, by a hook of our own."""
    keep = lm.keep_mask(tokens)

    def hook(module: nn.Module, args: tuple, output):
        resid = (output[0] if isinstance(output, tuple) else output).clone()
        resid[keep] = sae.decode(sae.encode(resid[keep][None], layers=[layer]))[0]
        return (resid, *output[1:]) if isinstance(output, tuple) else resid

    with torch.no_grad():
        clean = lm.hf(input_ids=tokens).logits.log_softmax(-1)
        handle = lm.hf.model.layers[layer].register_forward_hook(hook)
        try:
            return clean, lm.hf(input_ids=tokens).logits.log_softmax(-1)
        finally:
            handle.remove()


def ce(log_probs: torch.Tensor, tokens: torch.Tensor) -> float:
    return nn.functional.nll_loss(log_probs[:, :-1].flatten(0, 1).double(), tokens[:, 1:].flatten()).item()


@pytest.mark.parametrize("layer", LAYERS)
def test_delta_ce_and_kl_by_hand(lm: LanguageModel, blocks: TokenBlocks, layer: int):
    sae, tokens = make_sae(), all_tokens(blocks)
    clean, spliced = spliced_by_hand(lm, sae, tokens, layer)
    found = evaluate(sae, lm, blocks, **SETTINGS)
    row, published = quality(found)[layer], found.lawson2024["layers"][layer]
    assert row["delta_ce"] == pytest.approx(ce(spliced, tokens) - ce(clean, tokens), abs=2e-6)
    kl = (clean.double().exp() * (clean - spliced).double()).sum(-1).mean().item()
    assert row["kl"] == pytest.approx(kl, rel=1e-5)
    reversed_kl = nn.functional.kl_div(clean.double(), spliced.double(), log_target=True, reduction="batchmean").item()
    assert published["kl"] == pytest.approx(reversed_kl, rel=1e-5)


def test_delta_ce_of_the_last_layer_is_the_unembedding_of_the_reconstruction(lm: LanguageModel, blocks: TokenBlocks):
    """Nothing lies above the last block but the final norm and the unembedding: the layer that off-by-one errors hit."""
    sae, tokens, last = make_sae(), all_tokens(blocks), LAYERS[-1]
    resid, keep = lm.resid(tokens)[last], lm.keep_mask(tokens)
    with torch.no_grad():
        clean = lm.hf.lm_head(lm.hf.model.norm(resid)).log_softmax(-1)
        resid[keep] = sae.decode(sae.encode(resid[keep][None], layers=[last]))[0]
        spliced = lm.hf.lm_head(lm.hf.model.norm(resid)).log_softmax(-1)
    found = evaluate(sae, lm, blocks, **SETTINGS)
    assert quality(found)[last]["delta_ce"] == pytest.approx(ce(spliced, tokens) - ce(clean, tokens), abs=2e-6)


def test_every_layer_replaced_at_once_each_reads_what_came_before(lm: LanguageModel, blocks: TokenBlocks):
    sae, tokens = make_sae(), all_tokens(blocks)
    keep = lm.keep_mask(tokens)
    handles = []

    def hook_of(layer: int):
        def hook(module, args, output):
            resid = (output[0] if isinstance(output, tuple) else output).clone()
            resid[keep] = sae.decode(sae.encode(resid[keep][None], layers=[layer]))[0]
            return (resid, *output[1:]) if isinstance(output, tuple) else resid

        return hook

    with torch.no_grad(), contextlib.ExitStack() as stack:
        clean = lm.hf(input_ids=tokens).logits.log_softmax(-1)
        handles = [lm.hf.model.layers[layer].register_forward_hook(hook_of(layer)) for layer in LAYERS]
        for handle in handles:
            stack.callback(handle.remove)
        spliced = lm.hf(input_ids=tokens).logits.log_softmax(-1)
    found = evaluate(sae, lm, blocks, **SETTINGS)
    assert found.all_layers["delta_ce"] == pytest.approx(ce(spliced, tokens) - ce(clean, tokens), abs=2e-6)


def test_reconstruction_by_hand(lm: LanguageModel, blocks: TokenBlocks):
    sae, tokens = make_sae(), all_tokens(blocks)
    keep = lm.keep_mask(tokens)
    x = lm.resid(tokens)[:, keep]
    with torch.no_grad():
        code = sae.encode(x)
        recon = sae.decode(code)
    x64, recon64 = x.double(), recon.double()
    want = {
        "fvu": (x64 - recon64).square().sum((1, 2)) / (x64 - x64.mean(1, keepdim=True)).square().sum((1, 2)),
        "mse": (x64 - recon64).square().mean((1, 2)),
        "cosine": nn.functional.cosine_similarity(x64, recon64, dim=-1).mean(1),
        "norm_ratio": (recon64.norm(dim=-1) / x64.norm(dim=-1)).mean(1),
        "l0": (code.values > 0).double().sum(-1).mean(1),
        "l1": code.values.double().sum(-1).mean(1),
    }
    found = evaluate(sae, lm, blocks, **SETTINGS)
    assert found.n_tokens == int(keep.sum())
    assert found.n_spliced_tokens == tokens.numel()
    for name, values in want.items():
        assert column(found, name) == pytest.approx(values.tolist(), rel=1e-6), name
        assert found.mean[name] == pytest.approx(values.mean().item(), rel=1e-6)
    fired = torch.stack([(row > 1e-3).any(0) for row in code.to_dense()])
    assert found.dead_fraction == pytest.approx((~fired.any(0)).double().mean().item())
    assert column(found, "unused_fraction") == pytest.approx((~fired).double().mean(1).tolist())


def test_published_definitions_by_hand(lm, blocks, monkeypatch: pytest.MonkeyPatch):
    """Means over batches of MSE over the variance of all scalars, masked vectors kept as zeros on both sides."""
    monkeypatch.setattr(heldout, "BATCH_TOKENS", 4 * CONTEXT)
    sae, fvus, mses = make_sae(), [], []
    for start in (0, 4):
        tokens = blocks.read(start, 4)
        keep = lm.keep_mask(tokens)
        x = lm.resid(tokens)
        recon = torch.zeros_like(x)
        with torch.no_grad():
            recon[:, keep] = sae.decode(sae.encode(x[:, keep]))
        x = np.where(keep.numpy()[None, ..., None], x.numpy(), 0).astype(np.float64).reshape(3, -1)
        mse = np.square(x - recon.double().numpy().reshape(3, -1)).mean(1)
        mses.append(mse)
        fvus.append(mse / x.var(1, ddof=1))
    published = evaluate(sae, lm, blocks, **SETTINGS).lawson2024
    assert [row["fvu"] for row in published["layers"]] == pytest.approx(np.mean(fvus, 0).tolist(), rel=1e-5)
    assert [row["mse"] for row in published["layers"]] == pytest.approx(np.mean(mses, 0).tolist(), rel=1e-5)
    assert published["mean"]["fvu"] == pytest.approx(np.mean(fvus), rel=1e-5)


def test_training_and_evaluation_mean_the_same_by_fvu(lm: LanguageModel, blocks: TokenBlocks):
    """N7: the loss, with the variances of the very vectors, is the metric, and is what evaluate reports."""
    sae = make_sae()
    vectors = read(lm, sae, all_tokens(blocks)).vectors
    with torch.no_grad():
        code, recon = sae(vectors)
        _, squared = sae.error(vectors, code)
    moments = metrics.Moments(3, D_MODEL)
    moments.update(vectors)
    trained = losses.per_dimension(vectors, squared, moments.variance.float())
    assert trained.tolist() == pytest.approx(metrics.fvu(vectors, recon).tolist(), rel=1e-6)
    assert trained.tolist() == pytest.approx(column(evaluate(sae, lm, blocks, **SETTINGS), "fvu"), rel=1e-6)


# ---- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 1])
def test_a_splice_leaves_masked_positions_alone(lm: LanguageModel, blocks: TokenBlocks, layer: int):
    """What the next block is given, seen by a hook: the clean vector where masked, the reconstruction elsewhere."""
    sae, tokens = make_sae(), all_tokens(blocks)
    reading = read(lm, sae, tokens)
    assert not reading.visible[:, 0].any()
    assert (~reading.visible[:, 1:]).any()
    seen: list[torch.Tensor] = []
    handle = lm.hf.model.layers[layer + 1].register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    try:
        lm.logits(tokens, replace={layer: splice_with(sae, layer, reading.visible)})
    finally:
        handle.remove()
    with torch.no_grad():
        _, recon = sae(reading.vectors)
    assert torch.equal(seen[0][~reading.visible], reading.resid[layer][~reading.visible])
    assert torch.allclose(seen[0][reading.visible], recon[layer], atol=1e-5)


def test_what_evaluation_splices_in_is_clean_where_masked(lm, blocks, monkeypatch: pytest.MonkeyPatch):
    given: dict[int, torch.Tensor] = {}
    run_from = lm.run_from

    def watched(resid, layer, tokens):
        given[layer] = torch.cat([given.get(layer, resid[:0]), resid])
        return run_from(resid, layer, tokens)

    monkeypatch.setattr(lm, "run_from", watched)
    evaluate(make_sae(), lm, blocks, **SETTINGS)
    tokens = blocks.read(0, len(blocks))
    keep, resid = lm.keep_mask(tokens), lm.resid(tokens)
    assert given.keys() == set(LAYERS)
    for layer in LAYERS:
        assert torch.allclose(given[layer][~keep], resid[layer][~keep], atol=1e-6)
        assert not torch.allclose(given[layer][keep], resid[layer][keep], atol=1e-1)


def test_norm_outliers_are_left_out_of_every_layer_and_counted(lm: LanguageModel, blocks: TokenBlocks):
    sae, plain = make_sae(), evaluate(make_sae(), lm, blocks, **SETTINGS)
    norms = read(lm, sae, all_tokens(blocks)).vectors.norm(dim=-1)
    sae.norm_limit[1] = norms[1].sort().values[-6:-4].mean()  # five tokens are longer, at one layer
    found = evaluate(sae, lm, blocks, **SETTINGS)
    assert found.masked_by_norm == [0, 5, 0]
    assert found.n_tokens == plain.n_tokens - 5
    assert found.clean_ce == pytest.approx(plain.clean_ce)


# ---- limits and names ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "spliced"), [(1, 1), (CONTEXT, 1), (CONTEXT + 1, 2), (7 * CONTEXT, 7), (10**9, 8), (None, 8)]
)
@pytest.mark.parametrize("batch_tokens", [CONTEXT, 3 * CONTEXT])
def test_splice_tokens_is_rounded_up_to_sequences(lm, blocks, monkeypatch, limit, spliced, batch_tokens):
    monkeypatch.setattr(heldout, "BATCH_TOKENS", batch_tokens)
    found = evaluate(make_sae(), lm, blocks, splice_tokens=limit, **SETTINGS)
    assert found.n_spliced_tokens == spliced * CONTEXT
    assert found.n_tokens == int(lm.keep_mask(all_tokens(blocks)).sum())
    tokens = blocks.read(0, spliced)
    assert found.clean_ce == pytest.approx(lm.hf(input_ids=tokens, labels=tokens).loss.item(), rel=1e-6)


def test_tokens_limits_what_is_read(lm: LanguageModel, blocks: TokenBlocks):
    for tokens, n_blocks in ((1, 1), (3 * CONTEXT, 3), (4 * CONTEXT - 1, 3), (10**9, 8)):
        found = evaluate(make_sae(), lm, blocks, tokens=tokens, progress=False)
        assert found.n_spliced_tokens == n_blocks * CONTEXT


def test_names_are_those_of_evaluation_json(lm: LanguageModel, blocks: TokenBlocks):
    measured = evaluate(make_sae((2, 0)), lm, blocks, **SETTINGS)
    found = json.loads(json.dumps(finite(measured.to_dict()), allow_nan=False))
    top = {"n_tokens", "layers", "mean", "all_layers", "clean_ce", "dead_fraction", "lawson2024"}
    assert top <= found.keys()
    row = {"layer", "fvu", "mse", "cosine", "l0", "l1", "delta_ce", "kl"}
    assert all(row <= layer.keys() for layer in found["layers"])
    assert [layer["layer"] for layer in found["layers"]] == [2, 0]
    assert found["mean"].keys() == found["layers"][0].keys() - {"layer"}
    assert found["all_layers"].keys() == {"delta_ce", "kl"}
    assert {"fvu", "mse", "kl"} <= found["lawson2024"]["mean"].keys()
    assert [layer["layer"] for layer in found["lawson2024"]["layers"]] == [2, 0]
    assert found["layers"][0]["fvu"] == {"value": measured.layers[0]["fvu"], "ci95": [None, None]}  # too few documents
    assert found["layers"][0]["unused_fraction"] == measured.layers[0]["unused_fraction"]
    for name, value in measured.mean.items():
        assert value == pytest.approx(sum(layer[name] for layer in measured.layers) / 2)


def test_intervals_are_of_documents_left_out(lm: LanguageModel, blocks: TokenBlocks):
    """Every sequence a document: the interval is the jackknife of evaluations without one of them."""
    documents = TokenBlocks(blocks._tokens, np.arange(8) * CONTEXT, blocks.info)
    sae = make_sae()
    found = evaluate(sae, lm, documents, **SETTINGS)

    def without(left_out: int) -> Evaluation:
        kept = [row for row in range(8) if row != left_out]
        return evaluate(sae, lm, TokenBlocks(blocks._tokens[kept], documents.document_starts, blocks.info), **SETTINGS)

    others = [without(row) for row in range(8)]
    for where, name in (("mean", "fvu"), ("mean", "cosine"), ("mean", "delta_ce"), ("all_layers", "kl")):
        rest = torch.tensor([getattr(other, where)[name] for other in others])
        want = jackknife(torch.tensor(getattr(found, where)[name]), rest)
        assert found.ci95[where][name] == pytest.approx([want.low.item(), want.high.item()], abs=1e-5)
    low, high = found.ci95["clean_ce"]
    assert low < found.clean_ce < high
    assert all(
        row["fvu"][0] < layer["fvu"] < row["fvu"][1]
        for row, layer in zip(found.ci95["layers"], found.layers, strict=True)
    )


# ---- changes nothing -------------------------------------------------------------------------------------------------


def test_evaluation_changes_no_bit_of_the_sae(lm: LanguageModel, blocks: TokenBlocks):
    """N9."""
    sae = make_sae()
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    config, weights = sae.config, [p.data_ptr() for p in lm.hf.parameters()]
    generator = torch.get_rng_state()
    first, second = (finite(evaluate(sae, lm, blocks, **SETTINGS).to_dict()) for _ in range(2))
    assert {**first, "seconds": 0} == {**second, "seconds": 0}
    assert all(torch.equal(tensor, before[name]) for name, tensor in sae.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in sae.parameters())
    assert sae.config == config
    assert [p.data_ptr() for p in lm.hf.parameters()] == weights
    assert torch.equal(torch.get_rng_state(), generator)


def test_validation_at_every_step_changes_no_bit_of_the_weights(tmp_path, trained: Path, lm_folder: Path, corpus: Path):
    """N9: the run of `trained`, watched at every step."""
    flags = ("--validate-every-steps", "1", "--validation-sequences", "2")
    assert main(train_command(*flags, lm=lm_folder, data=corpus, out=tmp_path / "run")) == 0
    watched, plain = (load_file(run / "sae" / "model.safetensors") for run in (tmp_path / "run", trained))
    assert watched.keys() == plain.keys()
    assert all(torch.equal(watched[name], plain[name]) for name in plain)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(line["validation_fvu"]) for line in lines[1::2])


# ---- what is read ----------------------------------------------------------------------------------------------------


def test_a_path_is_read_in_the_held_out_part_unless_a_split_is_named(lm: LanguageModel, corpus: Path):
    sae = make_sae()
    held_out = evaluate(sae, lm, str(corpus), context_length=CONTEXT, **SETTINGS)
    for split in ("test", "train"):
        tokens = pack(TextSource(str(corpus), split), lm.tokenizer, CONTEXT, progress=False)
        named = evaluate(sae, lm, str(corpus), split=split, context_length=CONTEXT, **SETTINGS)
        assert named.n_spliced_tokens == tokens.n_tokens
        assert (named.clean_ce == held_out.clean_ce) == (split == "test")


def test_what_does_not_fit_is_refused(lm: LanguageModel, blocks: TokenBlocks, corpus: Path):
    with pytest.raises(ModelError, match=r"sae: reads layer 3; .* has layers 0-2"):
        evaluate(make_sae((3,)), lm, blocks, **SETTINGS)
    with pytest.raises(ModelError, match=r"sae: reads vectors of 16 entries; .* d_model 32"):
        evaluate(MLSAE(MLSAEConfig(d_model=16, layers=(0,), k=4)), lm, blocks, **SETTINGS)
    with pytest.raises(ModelError, match="sae: was trained with tokenizer"):
        evaluate(make_sae(tokenizer_fingerprint=Tokenizer(byte_tokenizer(), "!").fingerprint), lm, blocks, **SETTINGS)
    evaluate(make_sae(tokenizer_fingerprint=lm.tokenizer.fingerprint), lm, blocks, tokens=CONTEXT, progress=False)
    with pytest.raises(ConfigError, match="context_length: 65 exceeds the model's 64"):
        evaluate(make_sae(), lm, str(corpus), context_length=65, **SETTINGS)
    separators = np.full((2, CONTEXT), lm.tokenizer.separator_id, dtype=np.uint16)
    with pytest.raises(DataError, match="no token is left after masking"):
        evaluate(make_sae(), lm, TokenBlocks(separators, blocks.document_starts[:0], blocks.info), **SETTINGS)
