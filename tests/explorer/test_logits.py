"""The logits page: the losses of evaluate on the same tokens, distributions that are ones, and the logit lens of one latent."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from explorer.conftest import D_MODEL, N_LATENTS, N_LAYERS, PROMPT, Shelf, made_sae, session_of
from mlsae import LanguageModel, evaluate, pack
from mlsae.analysis.vocabulary import words_of
from mlsae.data import TokenBlocks
from mlsae.errors import ConfigError
from mlsae.explorer.answers import json_bytes
from mlsae.explorer.inference import Session, Shared
from mlsae.explorer.logits import LogitsRequest, latent_logits_view, logits_view
from mlsae.explorer.steering import Edit, SteerRequest, changes_by_layer, dosed, replacements, steer_view
from mlsae.reading import read
from mlsae.text import TextSource

KINDS: list[dict[str, Any]] = [
    {},
    {"frame": "vector"},
    {"lens": True},
    {"layers": (5, 0, 2)},
    {"mask_first_position": False},
]
STRONG = (Edit(latent=3, dose=30.0),)


def page(session: Session, text: str = PROMPT, **more: Any) -> dict[str, Any]:
    found = logits_view(session, LogitsRequest(text=text, **more))
    json_bytes(found)
    return found


# ---- three distributions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_evaluate_on_the_same_tokens(tiny_lm: LanguageModel, corpus: Path, kind: dict):
    packed = pack(TextSource(str(corpus), "test"), tiny_lm.tokenizer, 48, progress=False)
    tokens = packed.read(0, 1, order="file")
    block = TokenBlocks(tokens.numpy().astype(packed._tokens.dtype), packed.document_starts, packed.info)
    sae = made_sae(**kind)
    wanted = evaluate(sae, tiny_lm, block, progress=False)
    mean = page(session_of(Shelf(sae), tiny_lm), tiny_lm.tokenizer.text(tokens[0].tolist()))["mean"]
    assert mean["n"] == 47
    assert mean["ce_clean"] == pytest.approx(wanted.clean_ce, abs=1e-6)
    assert mean["ce_reconstructed"] - mean["ce_clean"] == pytest.approx(wanted.all_layers["delta_ce"], abs=1e-6)
    assert mean["kl_reconstructed"] == pytest.approx(wanted.all_layers["kl"], rel=1e-6)
    assert (mean["ce_steered"], mean["kl_steered"]) == (None, None)


@pytest.mark.parametrize("reconstruct", [False, True])
def test_positions_hold_the_distributions_and_losses_of_three_passes(tiny_lm: LanguageModel, reconstruct: bool):
    sae = made_sae()
    session = session_of(Shelf(sae), tiny_lm)
    found = page(session, edits=STRONG, top=4, reconstruct=reconstruct)
    reading = read(tiny_lm, sae, tiny_lm.tokenize(PROMPT))
    changes = changes_by_layer(dosed(session, STRONG, session.code_of(PROMPT)))
    passes = {
        "clean": tiny_lm.logits(reading.tokens),
        "reconstructed": tiny_lm.logits(reading.tokens, replacements(sae, {}, reading.visible, reconstruct=True)),
        "steered": tiny_lm.logits(reading.tokens, replacements(sae, changes, reading.visible, reconstruct=reconstruct)),
    }
    p = {name: logits[0].double().softmax(-1) for name, logits in passes.items()}
    ids = reading.tokens[0].tolist()
    assert len(found["positions"]) == len(ids)
    for name, q in p.items():
        ce = [-float(q[pos, ids[pos + 1]].log()) for pos in range(len(ids) - 1)]
        kl = (p["clean"] * (p["clean"] / q).log()).sum(-1).tolist()
        for pos, row in enumerate(found["positions"]):
            last = pos == len(ids) - 1
            assert row["pos"] == pos
            assert row["actual"] == (
                None if last else {"id": ids[pos + 1], "string": found["tokens"][pos + 1]["string"]}
            )
            assert [word["p"] for word in row[name]] == pytest.approx(q[pos].topk(4).values.tolist(), rel=1e-4)
            assert row[f"ce_{name}"] == (None if last else pytest.approx(ce[pos], rel=1e-5, abs=1e-5))
            if name != "clean":
                assert row[f"kl_{name}"] == pytest.approx(kl[pos], rel=1e-4, abs=1e-5)
        assert found["mean"][f"ce_{name}"] == pytest.approx(sum(ce) / len(ce), rel=1e-5)
        if name != "clean":
            assert found["mean"][f"kl_{name}"] == pytest.approx(sum(kl) / len(kl), rel=1e-4)
    assert found["mean"]["kl_steered"] > 0.01


def test_all_tokens_together_have_probability_1(tiny_lm: LanguageModel):
    found = page(session_of(Shelf(made_sae()), tiny_lm), "cat", top=32)
    assert 0 < sum(word["p"] for word in found["positions"][1]["clean"]) <= 1 + 1e-6


def test_without_edits_nothing_is_steered_and_an_edit_that_does_nothing_is_the_clean_model(tiny_lm: LanguageModel):
    session = session_of(Shelf(made_sae()), tiny_lm)
    assert {row["steered"] for row in page(session)["positions"]} == {None}
    still = page(session, edits=(Edit(latent=3, dose=0.0),))
    assert all(row["steered"] == row["clean"] and row["kl_steered"] == 0 for row in still["positions"])


def test_both_pages_steer_alike(tiny_lm: LanguageModel):
    session = session_of(Shelf(made_sae()), tiny_lm)
    steered = steer_view(session, SteerRequest(text=PROMPT, edits=STRONG, n_new=0, pos=9))["next"]
    row = page(session, edits=STRONG, top=10)["positions"][9]
    assert (row["steered"], row["clean"], row["kl_steered"]) == (steered["steered"], steered["clean"], steered["kl"])


def test_a_part_of_the_positions_is_that_part_and_the_means_stay(tiny_lm: LanguageModel):
    session = session_of(Shelf(made_sae()), tiny_lm)
    whole, part, end = page(session), page(session, start=5, stop=9), page(session, start=30, stop=99)
    assert part["positions"] == whole["positions"][5:9]
    assert end["positions"] == whole["positions"][30:]
    assert (part["start"], part["stop"], end["stop"]) == (5, 9, 33)
    assert part["mean"] == whole["mean"] == end["mean"]


@pytest.mark.parametrize("text", ["a", "<|endoftext|>", "<|endoftext|><|pad|>"])
def test_a_prompt_without_visible_tokens_is_not_changed(tiny_lm: LanguageModel, text: str):
    found = page(session_of(Shelf(made_sae()), tiny_lm), text, edits=STRONG)
    for row in found["positions"]:
        assert row["clean"] == row["reconstructed"] == row["steered"]
    if len(found["tokens"]) == 1:
        assert (found["mean"]["n"], found["mean"]["ce_clean"], found["mean"]["kl_reconstructed"]) == (0, None, 0)


@pytest.mark.parametrize(
    ("more", "field"), [({"start": 33}, "start"), ({"start": 5, "stop": 5}, "stop"), ({"stop": 257}, "stop")]
)
def test_positions_that_are_not_there_are_refused(tiny_lm: LanguageModel, more: dict, field: str):
    with pytest.raises(ConfigError) as caught:
        page(session_of(Shelf(made_sae()), tiny_lm), **more)
    assert caught.value.field == field


@pytest.mark.parametrize(
    "body",
    [
        *({"start": x} for x in (-1, 1.0, "0", True, None)),
        *({"stop": x} for x in (0, 64.0, "64", True)),
        *({"top": x} for x in (0, 33, 5.0, True)),
        {"n_new": 3},
    ],
)
def test_a_request_that_is_not_exactly_one_is_refused(body: dict[str, Any]):
    with pytest.raises(ValidationError):
        LogitsRequest.model_validate({"text": "x"} | body)


# ---- one latent ------------------------------------------------------------------------------------------------------


def test_a_latents_words_are_those_of_analyze(tiny_lm: LanguageModel, tiny_run: Path):
    shelf = Shelf.of_run(tiny_run)
    wanted = words_of(shelf.sae, tiny_lm)
    for latent in (0, 77, N_LATENTS - 1):
        found = latent_logits_view(session_of(shelf, tiny_lm), latent)
        assert found["same_at_every_layer"]
        assert [row["layer"] for row in found["layers"]] == list(range(N_LAYERS))
        for row in found["layers"]:
            for name in ("promoted", "suppressed"):
                ids, values = (getattr(wanted.logits, attribute)[latent] for attribute in (name, f"{name}_logits"))
                assert [word["string"] for word in row[name]] == [wanted.strings[int(i)] for i in ids]
                assert [word["logit"] for word in row[name]] == pytest.approx(values.tolist(), rel=1e-5)
        json_bytes(found)


@pytest.mark.parametrize("kind", [{"lens": True}, {"frame": "vector", "lens": True}, {"frame": "none"}])
def test_a_direction_is_what_one_unit_adds_to_the_residual_stream(tiny_lm: LanguageModel, kind: dict):
    """By layer, from two decodings: with a lens it differs from layer to layer."""
    sae, latent = made_sae(**kind), 9
    found = latent_logits_view(session_of(Shelf(sae), tiny_lm), latent)
    assert found["same_at_every_layer"] == ("lens" not in kind)
    code = sae.encode(torch.randn(N_LAYERS, 1, D_MODEL))
    units = []
    for value in (0.0, 1.0):
        one = torch.full_like(code.values[..., :1], value)
        ids = torch.full_like(code.indices[..., :1], latent)
        units.append(sae.decode(type(code)(one, ids, code.shift, code.scale, code.rows, N_LATENTS)))
    logits = tiny_lm.logits_along((units[1] - units[0])[:, 0])[:, : len(tiny_lm.tokenizer.hf)]
    for row, wanted in zip(found["layers"], logits, strict=True):
        values = [word["logit"] for word in row["promoted"]]
        assert values == pytest.approx(wanted.topk(8).values.tolist(), rel=1e-3, abs=1e-4)
        values = [word["logit"] for word in row["suppressed"]]
        assert values == pytest.approx((-(-wanted).topk(8).values).tolist(), rel=1e-3, abs=1e-4)
    assert {row["relative_norm"] for row in found["layers"]} == {None}  # without an analysis


def test_the_relative_norm_is_that_of_the_mean_contribution(tiny_lm: LanguageModel, tiny_run: Path):
    shelf = Shelf.of_run(tiny_run)
    whole = shelf.statistics.whole
    latent = int(whole.n_events.argmax())
    found = latent_logits_view(session_of(shelf, tiny_lm), latent)
    for row, shown in enumerate(found["layers"]):
        if not whole.counts[row, latent]:
            assert shown["relative_norm"] is None
            continue
        mean = whole.totals[row, latent] / whole.counts[row, latent]
        length = mean * shelf.sae.frame.scale[row] * shelf.sae.W_dec[latent].norm()
        wanted = float(length) / shelf.similarity["resid"]["norm"]["mean"][row]
        assert shown["relative_norm"] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    "wrong", [None, {}, {"resid": []}, {"resid": {"norm": {"mean": [1.0]}}}, {"resid": {"norm": 3}}]
)
def test_a_similarity_file_that_is_none_gives_no_norms(tiny_lm: LanguageModel, tiny_run: Path, wrong: Any):
    shelf = Shelf.of_run(tiny_run)
    shelf.similarity = wrong
    found = latent_logits_view(session_of(shelf, tiny_lm), 3)
    assert {row["relative_norm"] for row in found["layers"]} == {None}


def test_of_several_groups_only_the_latents_own_layers_are_shown(tiny_lm: LanguageModel):
    found = latent_logits_view(session_of(Shelf(made_sae(groups=2)), tiny_lm), N_LATENTS - 1)
    assert [row["layer"] for row in found["layers"]] == [3, 4, 5]


def test_a_latent_that_is_not_there_is_refused_before_a_language_model_is_loaded():
    with pytest.raises(ConfigError, match="latents 0 to 127"):
        latent_logits_view(Session(Shared(Shelf(made_sae(), "nowhere"))), N_LATENTS)
