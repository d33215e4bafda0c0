"""Steering: an edit moves a latent's own contribution and nothing else, at every layer, in any order, in any frame."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from explorer.conftest import D_MODEL, N_LATENTS, N_LAYERS, PROMPT, Shelf, made_sae, session_of
from mlsae import LanguageModel
from mlsae.errors import ConfigError
from mlsae.evaluate import splice_with
from mlsae.explorer.answers import json_bytes
from mlsae.explorer.inference import Cancelled
from mlsae.explorer.steering import (
    Change,
    Edit,
    SteerRequest,
    changes_by_layer,
    contribution,
    dosed,
    layers_of,
    replacements,
    steer_view,
)
from mlsae.reading import read
from mlsae.sae import MLSAE, Code

KINDS: list[dict[str, Any]] = [
    {},
    {"frame": "vector"},
    {"frame": "none"},
    {"lens": True},
    {"frame": "vector", "lens": True},
]


def edits(*texts: str) -> tuple[Edit, ...]:
    return tuple(map(Edit.parse, texts))


def steered(
    lm: LanguageModel, sae: MLSAE, *texts: str, text: str = PROMPT, tokens: Tensor | None = None, **more: Any
) -> Tensor:
    """Logits of a prompt, in units of 1 unless the prompt gives others."""
    session = session_of(Shelf(sae), lm)
    code = session.code_of(text)
    changes = changes_by_layer(dosed(session, edits(*texts), code))
    tokens = torch.tensor([code.ids]) if tokens is None else tokens
    where = torch.nn.functional.pad(code.visible[None], (0, tokens.shape[1] - len(code.ids)))
    return lm.logits(tokens, replacements(sae, changes, where, **more))


def strongest(lm: LanguageModel, sae: MLSAE, layer: int, text: str = PROMPT) -> int:
    """The latent most active at a layer of a prompt."""
    row = sae.layers.index(layer)
    reading = read(lm, sae, lm.tokenize(text))
    return int(sae.encode(reading.vectors).to_dense()[row].sum(0).argmax())


def inactive(lm: LanguageModel, sae: MLSAE, text: str = PROMPT) -> int:
    """A latent active nowhere on a prompt."""
    code = sae.encode(read(lm, sae, lm.tokenize(text)).resid).to_dense()
    return int((code.sum((0, 1, 2)) == 0).nonzero()[0])


def mean_on(lm: LanguageModel, sae: MLSAE, latent: int, layer: int) -> float:
    """Its mean activation at a layer where it is active: the unit of a dose."""
    code = sae.encode(read(lm, sae, lm.tokenize(PROMPT)).vectors).to_dense()[sae.layers.index(layer), :, latent]
    return float(code[code > 0].double().mean())


# ---- laws ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_no_edits_are_the_clean_logits_bit_for_bit(tiny_lm: LanguageModel, kind: dict):
    clean = tiny_lm.logits(tiny_lm.tokenize(PROMPT))
    assert torch.equal(steered(tiny_lm, made_sae(**kind)), clean)
    found = steer_view(session_of(Shelf(made_sae(**kind)), tiny_lm), SteerRequest(text=PROMPT, n_new=4))
    assert found["continuation"]["clean"] == found["continuation"]["steered"]
    assert found["next"]["kl"] == 0
    assert all(row["clean"] == row["steered"] for row in found["next"]["changes"])


@pytest.mark.parametrize("kind", KINDS)
def test_ablating_an_inactive_latent_changes_nothing(tiny_lm: LanguageModel, kind: dict):
    sae = made_sae(**kind)
    clean = tiny_lm.logits(tiny_lm.tokenize(PROMPT))
    assert torch.equal(steered(tiny_lm, sae, f"{inactive(tiny_lm, sae)}:all:ablate"), clean)
    assert not torch.equal(steered(tiny_lm, sae, f"{strongest(tiny_lm, sae, 2)}:all:ablate"), clean)


@pytest.mark.parametrize("kind", KINDS)
def test_ablating_is_clamping_to_0(tiny_lm: LanguageModel, kind: dict):
    sae = made_sae(**kind)
    latent = strongest(tiny_lm, sae, 2)
    ablated, clamped = (steered(tiny_lm, sae, f"{latent}:all:{what}") for what in ("ablate", "clamp:0"))
    assert torch.equal(ablated, clamped)


def test_adding_nothing_changes_nothing(tiny_lm: LanguageModel):
    sae = made_sae()
    clean = tiny_lm.logits(tiny_lm.tokenize(PROMPT))
    assert torch.equal(steered(tiny_lm, sae, f"{strongest(tiny_lm, sae, 2)}:all:add:0", "9:1:add:-0.0"), clean)


def test_the_order_of_edits_and_of_their_layers_does_not_matter(tiny_lm: LanguageModel):
    sae = made_sae()
    a, b = strongest(tiny_lm, sae, 1), strongest(tiny_lm, sae, 4)
    given = [f"{a}:1,4:add:2.5", f"{b}:all:clamp:0.7", f"{a}:all:add:-0.3", "3:0,5:add:1.1"]
    orders = list(itertools.permutations(given))
    wanted = steered(tiny_lm, sae, *orders[0])
    for order in orders[1::5]:
        assert torch.equal(steered(tiny_lm, sae, *order), wanted)
    assert torch.equal(steered(tiny_lm, sae, f"{a}:4,1:add:2.5", *given[1:]), wanted)


def test_two_doses_of_one_latent_add_up(tiny_lm: LanguageModel):
    sae = made_sae()
    latent = strongest(tiny_lm, sae, 2)
    one = steered(tiny_lm, sae, f"{latent}:2:add:1.5")
    two = steered(tiny_lm, sae, f"{latent}:2:add:1", f"{latent}:2:add:0.5")
    torch.testing.assert_close(two, one)


@pytest.mark.parametrize("pair", [("clamp:1", "clamp:2"), ("clamp:1", "ablate")])
def test_edits_that_contradict_each_other_are_refused(tiny_lm: LanguageModel, pair: tuple[str, str]):
    with pytest.raises(ConfigError, match="latent 3 is set to two values at layer 2"):
        steered(tiny_lm, made_sae(), *(f"3:{layers}:{what}" for layers, what in zip(("1,2", "2"), pair, strict=True)))


@pytest.mark.parametrize("kind", [{}, {"frame": "vector", "lens": True}])
def test_padding_changes_nothing(tiny_lm: LanguageModel, kind: dict):
    sae = made_sae(**kind)
    tokens = tiny_lm.tokenize([PROMPT, "x" * 60])[:1]
    given = f"{strongest(tiny_lm, sae, 2)}:all:add:2", f"{strongest(tiny_lm, sae, 4)}:3:clamp:3"
    padded, plain = (steered(tiny_lm, sae, *given, tokens=t) for t in (tokens, None))
    assert padded.shape[1] == 60 > plain.shape[1]
    torch.testing.assert_close(padded[:, : plain.shape[1]], plain, rtol=1e-4, atol=1e-4)


def test_masked_positions_are_left_alone(tiny_lm: LanguageModel):
    """The first position is masked: what it says of the next token stays, and all others change."""
    sae = made_sae()
    clean, found = tiny_lm.logits(tiny_lm.tokenize(PROMPT)), steered(tiny_lm, sae, "3:all:add:9", reconstruct=True)
    assert torch.equal(found[:, 0], clean[:, 0])
    assert ((found - clean).abs().amax(-1)[0, 1:] > 0).all()


# ---- against brute force ---------------------------------------------------------------------------------------------


def changed(code: Tensor, latent: int, op: str, amount: float) -> Tensor:
    """A dense code after one edit."""
    code = code.clone()
    code[..., latent] = code[..., latent] + amount if op == "add" else amount
    return code


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", [0, N_LAYERS - 1])
@pytest.mark.parametrize("op", ["add", "clamp", "ablate"])
def test_one_layer_is_the_pass_resumed_from_an_edited_stream(tiny_lm: LanguageModel, kind: dict, layer: int, op: str):
    sae = made_sae(**kind)
    latent, dose = strongest(tiny_lm, sae, layer), {"add": 1.5, "clamp": -2.0, "ablate": 0.0}[op]
    amount = dose * mean_on(tiny_lm, sae, latent, layer)
    reading = read(tiny_lm, sae, tiny_lm.tokenize(PROMPT))
    resid = reading.resid[layer].clone()
    code = sae.encode(resid[reading.visible][None], layers=[layer])
    everything = torch.arange(N_LATENTS).expand(*code.values.shape[:-1], -1)
    before, after = (
        sae.decode(Code(z, everything, code.shift, code.scale, code.rows, N_LATENTS))[0]
        for z in (code.to_dense(), changed(code.to_dense(), latent, op, amount))
    )
    resid[reading.visible] += after - before
    wanted = tiny_lm.run_from(resid, layer, reading.tokens)
    found = steered(tiny_lm, sae, f"{latent}:{layer}:{op}:{dose}")
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert (found - tiny_lm.logits(reading.tokens)).abs().max() > 0.01


@pytest.mark.parametrize("kind", [{}, {"frame": "vector", "lens": True}])
@pytest.mark.parametrize("reconstruct", [False, True])
def test_all_layers_are_edited_one_after_another_as_the_stream_arrives(
    tiny_lm: LanguageModel, kind: dict, reconstruct: bool
):
    sae, text = made_sae(**kind), PROMPT[:8]
    latents = [strongest(tiny_lm, sae, layer, text) for layer in (0, 3)]
    session = session_of(Shelf(sae), tiny_lm)
    given = f"{latents[0]}:all:add:1.3", f"{latents[1]}:0,1,2,3,4,5:clamp:0.4"
    units = [each.units for each in dosed(session, edits(*given), session.code_of(text))]
    reading = read(tiny_lm, sae, tiny_lm.tokenize(text))

    def brute(layer: int) -> Any:
        def fn(resid: Tensor) -> Tensor:
            out = resid.clone()
            for pos in reading.visible[0].nonzero().flatten().tolist():  # one vector at a time
                x = resid[:, pos : pos + 1]
                code = sae.encode(x, layers=[layer])
                z = changed(code.to_dense(), latents[0], "add", 1.3 * units[0][layer])
                z = changed(z, latents[1], "clamp", 0.4 * units[1][layer])
                ids = torch.arange(N_LATENTS).expand(*z.shape[:-1], -1)
                with_edits = sae.decode(Code(z, ids, code.shift, code.scale, code.rows, N_LATENTS))
                out[:, pos : pos + 1] = with_edits if reconstruct else x + with_edits - sae.decode(code)
            return out

        return fn

    wanted = tiny_lm.logits(reading.tokens, {layer: brute(layer) for layer in sae.layers})
    found = steered(tiny_lm, sae, *given, text=text, reconstruct=reconstruct)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    assert (found - tiny_lm.logits(reading.tokens)).abs().max() > 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_reconstructing_without_edits_is_what_evaluate_splices(tiny_lm: LanguageModel, kind: dict):
    sae = made_sae(**kind)
    reading = read(tiny_lm, sae, tiny_lm.tokenize(PROMPT))
    splice = {layer: splice_with(sae, layer, reading.visible) for layer in sae.layers}
    wanted = tiny_lm.logits(reading.tokens, splice)
    assert torch.equal(steered(tiny_lm, sae, reconstruct=True), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_a_contribution_is_the_difference_of_two_decodings(kind: dict):
    sae = made_sae(**kind)
    resid = 3 * torch.randn(1, 20, D_MODEL)
    code = sae.encode(resid, layers=[4])
    change = Change((5, 40), (None, 0.25), (1.5, 0.5))
    z = changed(changed(code.to_dense(), 5, "add", 1.5), 40, "clamp", 0.75)
    ids = torch.arange(N_LATENTS).expand(*z.shape[:-1], -1)
    wanted = sae.decode(Code(z, ids, code.shift, code.scale, code.rows, N_LATENTS)) - sae.decode(code)
    torch.testing.assert_close(contribution(sae, code, change), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frame", ["layer", "none"])
def test_what_is_asked_for_is_what_is_read_again(tiny_lm: LanguageModel, frame: str):
    """An orthonormal dictionary and k = d_model: the code is exact, so the edited stream has the code that was asked for."""
    sae = made_sae(frame, n_latents=D_MODEL, k=D_MODEL)
    basis = torch.linalg.qr(torch.randn(D_MODEL, D_MODEL)).Q
    for weight in (sae.W_enc, sae.W_dec):
        weight.copy_(basis)
    resid = torch.randn(1, 12, D_MODEL)
    code = sae.encode(resid, layers=[3])
    before = code.to_dense()
    change = Change((2, 7, 11), (None, 0.0, 2.0), (0.75, 0.0, 0.5))
    after = sae.encode(resid + contribution(sae, code, change), layers=[3]).to_dense()
    on = before[0] > 0  # of one that was off, the negative part is not known
    wanted = before[0].clone()
    wanted[:, 2] += 0.75
    wanted[:, 7] = 0.0
    wanted[:, 11] = 2.5
    touched = torch.tensor([2, 7, 11])
    assert on[:, touched].any(0).all()
    torch.testing.assert_close(after[0][on], wanted[on], rtol=1e-5, atol=1e-5)
    untouched = [i for i in range(D_MODEL) if i not in touched]
    torch.testing.assert_close(after[0][:, untouched], before[0][:, untouched], rtol=1e-5, atol=1e-5)


def test_an_edit_by_hand():
    """One latent along the first axis, frame `none`: (3, 4) holds z = 3; clamped to 1 the vector is (1, 4), added 2 (5, 4)."""
    sae = made_sae("none", n_latents=D_MODEL, k=1, layers=(0,))
    sae.b_pre.zero_()
    for weight in (sae.W_enc, sae.W_dec):
        weight.zero_()
        weight[6, 0] = 1.0
    resid = torch.zeros(1, 1, D_MODEL)
    resid[0, 0, :2] = torch.tensor([3.0, 4.0])
    where = torch.ones(1, 1, dtype=torch.bool)
    for change, first in ((Change((6,), (1.0,), (0.0,)), 1.0), (Change((6,), (None,), (2.0,)), 5.0)):
        found = replacements(sae, {0: change}, where)[0](resid)
        assert found[0, 0, :3].tolist() == [first, 4.0, 0.0]
    found = replacements(sae, {0: Change((6,), (None,), (2.0,))}, where, reconstruct=True)[0](resid)
    assert found[0, 0, :3].tolist() == [5.0, 0.0, 0.0]


# ---- doses -----------------------------------------------------------------------------------------------------------


def test_a_dose_is_in_units_of_the_mean_activation_that_the_analysis_saw(tiny_lm: LanguageModel, tiny_run: Path):
    shelf = Shelf.of_run(tiny_run)
    session, whole = session_of(shelf, tiny_lm), shelf.statistics.whole
    code = session.code_of(PROMPT)
    seen = (whole.counts > 0).sum(0)
    for latent in (int(seen.argmax()), int(((seen > 0) & (seen < N_LAYERS)).nonzero()[0])):
        (found,) = dosed(session, edits(f"{latent}:all:add:3"), code)
        assert (found.unit_from, found.layers) == ("analysis", tuple(range(N_LAYERS)))
        overall = whole.totals[:, latent].sum() / whole.counts[:, latent].sum()
        for row, unit in enumerate(found.units):
            here = whole.totals[row, latent] / whole.counts[row, latent] if whole.counts[row, latent] else overall
            assert unit == pytest.approx(float(here), rel=1e-9)
    some = dosed(session, edits(f"{latent}:4,1:add:3"), code)[0]
    assert (some.layers, some.units) == ((1, 4), (found.units[1], found.units[4]))


def test_without_an_analysis_a_dose_is_in_units_of_the_prompts_own_mean_else_of_1(tiny_lm: LanguageModel):
    sae = made_sae()
    session = session_of(Shelf(sae), tiny_lm)
    code = session.code_of(PROMPT)
    latent = strongest(tiny_lm, sae, 2)
    (found,) = dosed(session, edits(f"{latent}:2:add:1"), code)
    assert found.unit_from == "prompt"
    assert found.units == pytest.approx((mean_on(tiny_lm, sae, latent, 2),), rel=1e-6)
    (none,) = dosed(session, edits(f"{inactive(tiny_lm, sae)}:0,3:add:1"), code)
    assert (none.unit_from, none.units) == ("none", (1.0, 1.0))


def test_what_is_not_there_is_refused_with_what_is(tiny_lm: LanguageModel):
    session = session_of(Shelf(made_sae(layers=(1, 4))), tiny_lm)
    code = session.code_of(PROMPT)
    for given, field, words in (
        (f"{N_LATENTS}:all:add:1", "edits.1.latent", "latents 0 to 127"),
        ("3:2:add:1", "edits.1.layers", "2; latent 3 is read at layers 1 to 4"),
    ):
        with pytest.raises(ConfigError, match=words) as caught:
            dosed(session, edits("3:1:add:1", given), code)
        assert caught.value.field == field


def test_of_several_groups_each_latent_is_edited_where_its_own_dictionary_reads(tiny_lm: LanguageModel):
    sae = made_sae(groups=2)
    assert (layers_of(sae, 0), layers_of(sae, N_LATENTS - 1)) == ((0, 1, 2), (3, 4, 5))
    latent = strongest(tiny_lm, sae, 4)
    everywhere, named = (steered(tiny_lm, sae, f"{latent}:{where}:add:2") for where in ("all", "3,4,5"))
    assert torch.equal(everywhere, named)
    with pytest.raises(ConfigError, match="layers 3 to 5"):
        steered(tiny_lm, sae, f"{latent}:0:add:2")


# ---- the page --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("remembers", [True, False])
def test_a_continuation_is_greedy_and_steered_at_every_token_it_makes(
    tiny_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch, remembers: bool
):
    """Whether the language model goes on from what it has seen or, as some must, reads it all again."""
    if not remembers:
        monkeypatch.setattr(tiny_lm, "begin", lambda: None)
    sae = made_sae()
    session = session_of(Shelf(sae), tiny_lm)
    latent = strongest(tiny_lm, sae, 2)
    given = edits(f"{latent}:all:add:6")
    found = steer_view(session, SteerRequest(text=PROMPT, edits=given, n_new=5))
    code = session.code_of(PROMPT)
    changes = changes_by_layer(dosed(session, given, code))
    for name, edited in (("clean", {}), ("steered", changes)):
        tokens, made = torch.tensor([code.ids]), []
        for _ in range(5):
            where = torch.ones_like(tokens, dtype=torch.bool)
            where[0, : len(code.ids)] = code.visible
            made.append(int(tiny_lm.logits(tokens, replacements(sae, edited, where))[0, -1].argmax()))
            tokens = torch.cat([tokens, torch.tensor([made[-1:]])], 1)
            if made[-1] in tiny_lm.tokenizer.special_ids:
                break
        assert found["continuation"][name]["tokens"] == tiny_lm.tokenizer.strings(made)
    assert found["continuation"]["clean"] != found["continuation"]["steered"]
    json_bytes(found)


@pytest.mark.parametrize("pos", [None, 0, 7])
def test_next_tokens_are_those_of_the_two_distributions(tiny_lm: LanguageModel, pos: int | None):
    sae = made_sae()
    given = f"{strongest(tiny_lm, sae, 2)}:all:add:4"
    request = SteerRequest(text=PROMPT, edits=edits(given), n_new=0, pos=pos)
    found = steer_view(session_of(Shelf(sae), tiny_lm), request)
    at = 32 if pos is None else pos
    p, q = (
        x[0, at].double().softmax(-1) for x in (tiny_lm.logits(tiny_lm.tokenize(PROMPT)), steered(tiny_lm, sae, given))
    )
    assert found["pos"] == at
    assert found["next"]["kl"] == pytest.approx(float((p * (p / q).log()).sum()), abs=1e-6)
    for name, wanted in (("clean", p), ("steered", q)):
        assert [row["id"] for row in found["next"][name]] == wanted.topk(10).indices.tolist()
        assert [row["p"] for row in found["next"][name]] == pytest.approx(wanted.topk(10).values.tolist(), rel=1e-5)
    change = (q - p).abs()
    if pos != 0:
        assert [row["id"] for row in found["next"]["changes"]] == change.topk(10).indices.tolist()
    assert found["continuation"] == {"clean": {"tokens": []}, "steered": {"tokens": []}}


def test_a_continuation_ends_with_a_special_token(tiny_lm: LanguageModel, monkeypatch):
    session = session_of(Shelf(made_sae()), tiny_lm)
    first = int(tiny_lm.logits(tiny_lm.tokenize(PROMPT))[0, -1].argmax())
    monkeypatch.setattr(tiny_lm.tokenizer, "special_ids", frozenset({first}))
    session._shared._codes.clear()
    found = steer_view(session, SteerRequest(text=PROMPT, n_new=20))
    assert found["continuation"]["clean"]["tokens"] == tiny_lm.tokenizer.strings([first])


@pytest.mark.parametrize("text", ["a", "<|endoftext|>"])
def test_a_prompt_without_visible_tokens_is_steered_in_what_follows(tiny_lm: LanguageModel, text: str):
    sae = made_sae()
    request = SteerRequest(text=text, edits=edits("3:all:add:30"), n_new=6, reconstruct=True)
    found = steer_view(session_of(Shelf(sae), tiny_lm), request)
    assert found["next"]["kl"] == 0
    assert found["continuation"]["clean"]["tokens"][0] == found["continuation"]["steered"]["tokens"][0]


def test_what_does_not_fit_the_model_is_refused_with_the_limit(tiny_lm: LanguageModel):
    session = session_of(Shelf(made_sae()), tiny_lm)
    with pytest.raises(ConfigError, match="n_new: 32 after a prompt of 33 tokens; 64 are possible"):
        steer_view(session, SteerRequest(text=PROMPT, n_new=32))
    assert steer_view(session, SteerRequest(text="a" * 62, n_new=2))["pos"] == 61
    with pytest.raises(ConfigError, match="pos: 33; the prompt has positions 0 to 32"):
        steer_view(session, SteerRequest(text=PROMPT, pos=33))


def test_steering_counts_its_steps_and_stops_when_nobody_waits(tiny_lm: LanguageModel):
    session = session_of(Shelf(made_sae()), tiny_lm)
    steer_view(session, SteerRequest(text=PROMPT, n_new=6, edits=edits("3:all:add:1")))
    assert 0 < session.done <= session.of
    session.cancelled = True
    with pytest.raises(Cancelled):
        steer_view(session, SteerRequest(text=PROMPT, n_new=6))


# ---- requests --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("7:3,4:add:2", Edit(latent=7, layers=(3, 4), op="add", dose=2.0)),
        ("0:all:clamp:-0.5", Edit(latent=0, op="clamp", dose=-0.5)),
        ("12:0:ablate", Edit(latent=12, layers=(0,), op="ablate", dose=0.0)),
        ("12:0:ablate:1", Edit(latent=12, layers=(0,), op="ablate", dose=1.0)),
        ("1:all:add:1e3", Edit(latent=1, dose=1000.0)),
    ],
)
def test_an_edit_is_spelled_and_read_again(text: str, wanted: Edit):
    assert Edit.parse(text) == wanted
    assert Edit.parse(str(wanted)) == wanted


@pytest.mark.parametrize(
    "text",
    [
        *("", "7", "7:3", "7:3:add", "7:3:add:", "7:3:add:1:2", ":3:add:1", "7::add:1", "7:3,:add:1", "7:3:mul:1"),
        *("-1:3:add:1", "7:-3:add:1", "7.0:3:add:1", "0x7:3:add:1", " 7:3:add:1", "٣:3:add:1", "7:all,3:add:1"),
        *("7:3:add:nan", "7:3:add:inf", "7:3:add:1e400", "7:3:add:10001", "7:3:add:true", "7:3:ADD:1", "7:3:clamp"),
    ],
)
def test_what_spells_no_edit_is_refused_with_an_example(text: str):
    with pytest.raises(ConfigError, match=r"edit: .*LATENT:LAYERS:OP:DOSE"):
        Edit.parse(text)


@pytest.mark.parametrize(
    "body",
    [
        *({"latent": x} for x in (-1, 1.0, 1.5, "0", True, None, float("inf"))),
        *({"layers": x} for x in ([], [1.0], ["1"], [True], [-1], 3, "all", [[1]])),
        *({"dose": x} for x in (float("nan"), float("inf"), -float("inf"), 10_001, -1e5, "1", True, None)),
        *({"op": x} for x in ("mul", None, 1, "ADD")),
        {"more": 1},
    ],
)
def test_an_edit_that_is_not_exactly_one_is_refused(body: dict[str, Any]):
    good = {"latent": 3, "layers": [1, 2], "op": "add", "dose": 1}
    assert Edit.model_validate(good).layers == (1, 2)
    with pytest.raises(ValidationError):
        Edit.model_validate(good | body)


@pytest.mark.parametrize(
    "body",
    [
        *({"n_new": x} for x in (-1, 65, 1.0, "5", True, None)),
        *({"pos": x} for x in (-1, 1.5, "0", True)),
        *({"reconstruct": x} for x in (1, 0, "true", None)),
        *({"edits": x} for x in (None, [3], "3:all:add:1", [{"latent": 1}] * 33)),
        {"lm": "elsewhere"},
    ],
)
def test_a_request_that_is_not_exactly_one_is_refused(body: dict[str, Any]):
    assert SteerRequest.model_validate({"text": "x", "edits": [{"latent": 1}]}).edits == (Edit(latent=1),)
    with pytest.raises(ValidationError):
        SteerRequest.model_validate({"text": "x"} | body)


def test_requests_are_frozen():
    with pytest.raises(ValidationError):
        Edit(latent=1).latent = 2  # type: ignore[misc]
