"""A prompt's page: the numbers of evaluate and analyze, and every total that of a dense code added up by hand."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from explorer.conftest import N_LATENTS, N_LAYERS, PROMPT, Shelf, made_sae, session_of
from mlsae import LanguageModel, evaluate, pack
from mlsae.analysis.example_file import read_examples
from mlsae.analyze import prompt_activity
from mlsae.data import TokenBlocks
from mlsae.errors import ConfigError, ModelError
from mlsae.explorer import prompts
from mlsae.explorer.answers import json_bytes
from mlsae.explorer.prompts import CompareRequest, PromptRequest, coactive_view, compare_view, prompt_view
from mlsae.reading import read
from mlsae.sae import MLSAE
from mlsae.text import TextSource

KINDS: list[dict[str, Any]] = [
    {},
    {"frame": "vector"},
    {"frame": "none"},
    {"lens": True},
    {"layers": (1, 4)},
    {"layers": (5, 0, 2)},
    {"groups": 2},
    {"mask_first_position": False},
    {"special_tokens": "zero", "frame": "vector"},
]


def page(lm: LanguageModel, sae: MLSAE, text: str = PROMPT, **more: Any) -> dict[str, Any]:
    found = prompt_view(session_of(Shelf(sae), lm), PromptRequest(text=text, **more))
    json_bytes(found)
    return found


def dense(lm: LanguageModel, sae: MLSAE, text: str = PROMPT, *, seen: bool = True) -> Tensor:
    """[layer, pos, latent] in float64, 0 at masked positions."""
    reading = read(lm, sae, lm.tokenize(text))
    code = sae.encode(reading.resid[:, 0]).to_dense().double()
    return code.where(reading.visible[0][:, None], 0.0) if seen else code


@pytest.fixture(scope="module")
def block(tiny_lm: LanguageModel, corpus: Path) -> TokenBlocks:
    """One block of text, of which the tokenizer gives back the ids."""
    found = pack(TextSource(str(corpus), "test"), tiny_lm.tokenizer, 48, progress=False)
    tokens = found.read(0, 1, order="file")
    text = tiny_lm.tokenizer.text(tokens[0].tolist())
    assert tiny_lm.tokenize(text).tolist() == tokens.tolist()
    return TokenBlocks(tokens.numpy().astype(found._tokens.dtype), found.document_starts, found.info)


# ---- the numbers of evaluate and analyze -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_quality_is_that_of_evaluate_on_the_same_tokens(tiny_lm: LanguageModel, block: TokenBlocks, kind: dict):
    sae = made_sae(**kind)
    wanted = evaluate(sae, tiny_lm, block, splice_tokens=0, progress=False)
    text = tiny_lm.tokenizer.text(block.read(0, 1, order="file")[0].tolist())
    found = page(tiny_lm, sae, text)
    assert found["layers"] == list(sae.layers)
    for name in ("fvu", "l0"):
        assert found["quality"][name] == pytest.approx([row[name] for row in wanted.layers], rel=1e-6)
    for row, fvu in zip(found["quality"]["error"], found["quality"]["fvu"], strict=True):
        visible = [x for x in row if x is not None]
        assert len(visible) == wanted.n_tokens == sum(token["visible"] for token in found["tokens"])
        assert sum(visible) / len(visible) == pytest.approx(fvu, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_activity_and_mass_are_those_of_analyze_on_the_same_prompt(tiny_lm: LanguageModel, kind: dict):
    sae = made_sae(**kind)
    wanted, found = prompt_activity(sae, tiny_lm, PROMPT), page(tiny_lm, sae)
    assert [token["string"] for token in found["tokens"]] == wanted.tokens
    assert [token["visible"] for token in found["tokens"]] == wanted.visible.tolist()
    torch.testing.assert_close(
        torch.tensor(found["activity"], dtype=torch.float64), wanted.by_position, rtol=1e-6, atol=1e-9
    )
    for row in found["latents"]:
        by_layer = wanted.mass[:, row["latent"]]
        assert row["by_layer"] == pytest.approx(by_layer.tolist(), rel=1e-6)
        assert row["mass"] == pytest.approx(float(by_layer.sum()), rel=1e-6)


def test_the_trained_run_reads_as_it_was_evaluated(tiny_lm: LanguageModel, tiny_run: Path):
    """A prompt of the page that `analyze` keeps is the same on both."""
    shelf = Shelf.of_run(tiny_run)
    wanted = prompt_activity(shelf.sae, tiny_lm, PROMPT)
    found = page(tiny_lm, shelf.sae)
    assert found["activity"][3] == pytest.approx(wanted.by_position[3].tolist(), rel=1e-6)


# ---- totals by hand --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [{}, {"lens": True}, {"layers": (5, 0, 2)}, {"groups": 2}, {"k": 40}])
def test_latents_and_heatmap_are_sums_of_the_dense_code_over_visible_positions(tiny_lm: LanguageModel, kind: dict):
    sae = made_sae(**kind)
    code, found = dense(tiny_lm, sae), page(tiny_lm, sae)
    mass = code.sum((0, 1))
    assert [row["latent"] for row in found["latents"]] == mass.argsort(descending=True, stable=True)[:50].tolist()[
        : int((mass > 0).sum())
    ]
    for row in found["latents"]:
        mine = code[:, :, row["latent"]]
        at = divmod(int(mine.argmax()), mine.shape[1])
        assert row["n_cells"] == int((mine > 0).sum())
        assert (row["peak_layer"], row["peak_pos"]) == (sae.layers[at[0]], at[1])
        assert row["peak"] == pytest.approx(float(mine.max()), rel=1e-6)
        rows = torch.arange(len(sae.layers), dtype=torch.float64)
        if sae.layers == tuple(range(N_LAYERS)):
            assert row["centre_of_mass"] == pytest.approx(float(rows @ mine.sum(1) / mine.sum()), abs=1e-6)
    chosen = found["heatmap"]["latents"]
    assert set(chosen) == set(mass.nonzero().flatten().tolist())
    centre = torch.arange(len(sae.layers), dtype=torch.float64) @ code.sum(1) / mass
    assert torch.equal(centre[chosen].argsort(stable=True), torch.arange(len(chosen)))
    shown = torch.tensor(found["heatmap"]["mass"], dtype=torch.float64)
    torch.testing.assert_close(shown, code.sum(1)[:, chosen], rtol=1e-6, atol=1e-9)


def test_the_heatmap_keeps_the_latents_of_largest_mass(tiny_lm: LanguageModel, monkeypatch):
    monkeypatch.setattr(prompts, "N_COLUMNS", 7)
    sae = made_sae()
    mass = dense(tiny_lm, sae).sum((0, 1))
    assert set(page(tiny_lm, sae)["heatmap"]["latents"]) == set(mass.topk(7).indices.tolist())


@pytest.mark.parametrize("top", [1, 3, 32])
def test_top_lists_the_strongest_at_every_layer_and_position_masked_ones_too(tiny_lm: LanguageModel, top: int):
    sae = made_sae()
    code, found = dense(tiny_lm, sae, seen=False), page(tiny_lm, sae, top=top)["top"]
    values, indices = code.topk(4, dim=-1)
    for row in range(N_LAYERS):
        for pos in range(code.shape[1]):
            n = min(top, 4, int((values[row, pos] > 0).sum()))
            assert [pair[0] for pair in found[row][pos]] == indices[row, pos, :n].tolist()
            assert [pair[1] for pair in found[row][pos]] == pytest.approx(values[row, pos, :n].tolist(), rel=1e-6)


def test_a_long_prompt_is_given_fewer_at_each_position(tiny_lm: LanguageModel, monkeypatch):
    """So that the answer stays small: two of the four, at 6 x 33 places."""
    monkeypatch.setattr(prompts, "MAX_PAIRS", 2 * N_LAYERS * 33 + 5)
    found = page(tiny_lm, made_sae())["top"]
    assert {len(pairs) for row in found for pairs in row} <= {0, 1, 2}
    assert found[0][5] == page(tiny_lm, made_sae(), top=2)["top"][0][5]


def test_the_cells_of_a_latent_are_all_its_activations(tiny_lm: LanguageModel):
    sae = made_sae()
    code = dense(tiny_lm, sae, seen=False)
    for latent in (0, 17, int(code.sum((0, 1)).argmax())):
        found = page(tiny_lm, sae, latent=latent)["latent"]
        assert found["latent"] == latent
        wanted = [[row, pos, code[row, pos, latent].item()] for row, pos in code[..., latent].nonzero().tolist()]
        assert [cell[:2] for cell in found["cells"]] == [cell[:2] for cell in wanted]
        assert [cell[2] for cell in found["cells"]] == pytest.approx([cell[2] for cell in wanted], rel=1e-6)
    assert page(tiny_lm, sae)["latent"] is None


# ---- prompts at the edge ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["a", "<|endoftext|>", "<|endoftext|><|pad|><|bos|>"])
def test_a_prompt_without_visible_tokens_works_and_has_no_quality(tiny_lm: LanguageModel, text: str):
    found = page(tiny_lm, made_sae(), text)
    assert not any(token["visible"] for token in found["tokens"])
    assert found["quality"]["fvu"] == found["quality"]["l0"] == [None] * N_LAYERS
    assert {x for row in found["quality"]["error"] for x in row} == {None}
    assert (found["latents"], found["heatmap"]["latents"]) == ([], [])
    assert all(x > 0 for row in found["activity"] for x in row)
    other = compare_view(session_of(Shelf(made_sae()), tiny_lm), CompareRequest(text=text, other=PROMPT))
    assert (other["a"]["n_visible"], other["both"], other["only_a"]) == (0, 0, 0)


def test_one_visible_token_has_no_variance_to_explain(tiny_lm: LanguageModel):
    found = page(tiny_lm, made_sae(), "ab")
    assert [token["visible"] for token in found["tokens"]] == [False, True]
    assert found["quality"]["fvu"] == [None] * N_LAYERS
    assert found["quality"]["l0"] != [None] * N_LAYERS


def test_masked_positions_are_counted_nowhere(tiny_lm: LanguageModel):
    """What is before a separator changes the rest only through the language model; the separator itself adds nothing."""
    sae = made_sae(mask_first_position=False)
    text = "<|endoftext|>" + PROMPT
    found = page(tiny_lm, sae, text)
    assert [token["visible"] for token in found["tokens"]] == [False] + [True] * 33
    assert [row[0] for row in found["quality"]["error"]] == [None] * N_LAYERS
    code = dense(tiny_lm, sae, text)
    assert sum(row["n_cells"] for row in found["latents"]) <= int((code > 0).sum())
    assert found["latents"][0]["mass"] == pytest.approx(float(code.sum((0, 1)).max()), rel=1e-6)


@pytest.mark.parametrize("latent", [N_LATENTS, 2**31, 2**53 + 1, 10**30])
def test_a_latent_that_is_not_there_is_refused_before_a_language_model_is_loaded(latent: int):
    shelf = Shelf(made_sae(), "nowhere")
    from mlsae.explorer.inference import Session, Shared

    session = Session(Shared(shelf))
    views = (
        lambda: prompt_view(session, PromptRequest(text=PROMPT, latent=latent)),
        lambda: coactive_view(session, latent),
    )
    for view in views:
        with pytest.raises(ConfigError, match=f"latent: {latent}; this SAE has latents 0 to {N_LATENTS - 1}"):
            view()


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"text": 5},
        {"text": None},
        {"text": "x", "more": 1},
        *({"text": "x", "latent": x} for x in (-1, 1.0, 1.5, "0", True, float("nan"), [1])),
        *({"text": "x", "top": x} for x in (0, 33, "8", 8.0, True, None)),
    ],
)
def test_a_request_that_is_not_exactly_one_is_refused(body: dict[str, Any]):
    with pytest.raises(ValidationError):
        PromptRequest.model_validate(body)


@pytest.mark.parametrize(
    ("text", "words"), [("", "empty"), ("ab\ud800", "character 2"), ("é" * 40_000, "80,000 bytes; at most 65,536")]
)
@pytest.mark.parametrize("field", ["text", "other"])
def test_a_text_that_cannot_be_a_prompt_is_refused_in_its_field(field: str, text: str, words: str):
    with pytest.raises(ValidationError, match=words) as caught:
        CompareRequest.model_validate({"text": "x", "other": "y"} | {field: text})
    assert [error["loc"] for error in caught.value.errors(include_input=False)] == [(field,)]


# ---- two prompts -----------------------------------------------------------------------------------------------------


def test_comparing_is_by_activation_per_visible_token(tiny_lm: LanguageModel):
    sae, texts = made_sae(), (PROMPT, "moon light")
    session = session_of(Shelf(sae), tiny_lm)
    found = compare_view(session, CompareRequest(text=texts[0], other=texts[1]))
    codes = [dense(tiny_lm, sae, text) for text in texts]
    n_visible = [33 - 1, 10 - 1]
    a, b = (code.sum(1) / n for code, n in zip(codes, n_visible, strict=True))
    assert [found[name]["n_visible"] for name in "ab"] == n_visible
    on = [code.sum((0, 1)) > 0 for code in codes]
    assert found["both"] == int((on[0] & on[1]).sum())
    assert (found["only_a"], found["only_b"]) == (int((on[0] & ~on[1]).sum()), int((on[1] & ~on[0]).sum()))
    difference = (a.sum(0) - b.sum(0)).abs()
    ids = [row["latent"] for row in found["latents"]]
    assert difference[ids].tolist() == pytest.approx(difference.sort(descending=True).values[: len(ids)].tolist())
    assert len(ids) == min(50, int((on[0] | on[1]).sum()))
    for row in found["latents"]:
        assert (row["a"], row["b"]) == pytest.approx(
            (float(a[:, row["latent"]].sum()), float(b[:, row["latent"]].sum()))
        )
        assert row["by_layer_a"] == pytest.approx(a[:, row["latent"]].tolist(), rel=1e-6)
        assert row["by_layer_b"] == pytest.approx(b[:, row["latent"]].tolist(), rel=1e-6)


def test_swapping_the_prompts_swaps_the_answer_and_a_prompt_is_like_itself(tiny_lm: LanguageModel):
    session = session_of(Shelf(made_sae()), tiny_lm)
    one, two = (compare_view(session, CompareRequest(text=a, other=b)) for a, b in ((PROMPT, "dogs"), ("dogs", PROMPT)))
    assert (one["a"], one["only_a"], one["both"]) == (two["b"], two["only_b"], two["both"])
    assert {(r["latent"], r["a"], r["b"]) for r in one["latents"]} == {
        (r["latent"], r["b"], r["a"]) for r in two["latents"]
    }
    same = compare_view(session, CompareRequest(text=PROMPT, other=PROMPT))
    assert (same["only_a"], same["only_b"]) == (0, 0)
    assert all(row["a"] == row["b"] for row in same["latents"])


# ---- company ---------------------------------------------------------------------------------------------------------


def test_co_active_latents_are_those_on_at_the_same_layer_and_token(tiny_lm: LanguageModel, tiny_run: Path):
    shelf = Shelf.of_run(tiny_run)
    sae, session = shelf.sae, session_of(shelf, tiny_lm)
    latent = int(shelf.statistics.whole.n_events.argmax())
    found = coactive_view(session, latent)
    examples = sorted(read_examples(shelf.examples, latent), key=lambda example: -example.value)
    contexts = list(dict.fromkeys(tuple(example.tokens) for example in examples))[:32]
    together, cells, tokens = torch.zeros(N_LATENTS), torch.zeros(N_LAYERS), 0
    for context in contexts:
        reading = read(tiny_lm, sae, torch.tensor([context]))
        on = sae.encode(reading.vectors).to_dense() > 0
        here = on[..., latent]
        together += on[here].sum(0)
        cells += here.sum(1)
        tokens += int(here.any(0).sum())
    assert (found["contexts"], found["tokens"], found["cells"]) == (len(contexts), tokens, int(cells.sum()))
    assert found["cells"] > 10
    together[latent] = 0
    assert [row["latent"] for row in found["coactive"]] == together.argsort(descending=True, stable=True)[:50].tolist()[
        : int((together > 0).sum())
    ]
    density = shelf.statistics.whole.density()
    for row in found["coactive"]:
        assert row["share"] == pytest.approx(float(together[row["latent"]] / cells.sum()))
        chance = float(cells.double() @ density[:, row["latent"]] / cells.sum())
        assert row["lift"] == (pytest.approx(row["share"] / chance) if chance else None)
        cosine = torch.nn.functional.cosine_similarity(sae.W_dec[latent], sae.W_dec[row["latent"]], dim=0)
        assert row["cosine"] == pytest.approx(float(cosine), abs=1e-6)
    json_bytes(found)


def test_a_twin_is_always_there(tiny_lm: LanguageModel, tiny_run: Path):
    """A latent with the same encoder row fires with the other wherever it fires, if k leaves room for both."""
    shelf = Shelf.of_run(tiny_run)
    latent = int(shelf.statistics.whole.n_events.argmax())
    twin = (latent + 1) % N_LATENTS
    with torch.no_grad():
        shelf.sae.W_enc[twin] = shelf.sae.W_enc[latent] * 1.0001
    found = coactive_view(session_of(shelf, tiny_lm), latent)
    assert found["coactive"][0]["latent"] == twin
    assert found["coactive"][0]["share"] == 1.0


def test_without_examples_it_says_so_and_loads_nothing():
    from mlsae.explorer.inference import Session, Shared

    gone = [{"what": "analysis", "why": "x", "command": "mlsae analyze RUN"}]
    session = Session(Shared(Shelf(made_sae(), "nowhere", gone=gone)))
    found = coactive_view(session, 3)
    assert (found["contexts"], found["coactive"], found["missing"]) == (0, [], gone)


def test_examples_of_another_tokenizer_are_refused(tiny_lm: LanguageModel, tiny_run: Path, monkeypatch):
    shelf = Shelf.of_run(tiny_run)
    about = prompts.read_about(shelf.examples)
    monkeypatch.setattr(prompts, "read_about", lambda path: replace(about, tokenizer_fingerprint="0" * 64))
    with pytest.raises(ModelError, match="another tokenizer"):
        coactive_view(session_of(shelf, tiny_lm), 3)


def test_examples_that_name_tokens_there_are_not_are_refused(tiny_lm: LanguageModel, tiny_run: Path, monkeypatch):
    shelf = Shelf.of_run(tiny_run)
    latent = int(shelf.statistics.whole.n_events.argmax())
    for wrong in (-1, tiny_lm.d_vocab):
        planted = [replace(e, tokens=[wrong] * len(e.tokens)) for e in read_examples(shelf.examples, latent)]
        monkeypatch.setattr(prompts, "read_examples", lambda path, latent, planted=planted: planted)
        with pytest.raises(ModelError, match="does not have"):
            coactive_view(session_of(shelf, tiny_lm), latent)
