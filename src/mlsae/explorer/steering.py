"""What happens when latents are added to, clamped or ablated inside a forward pass: next tokens and continuations.

An edit changes a latent's own contribution and nothing else; what the SAE does not reconstruct stays as it is:

    resid + (z_new - z_old) * direction        at the layers named, at every visible position and every generated one

`z_old` is read from the stream as it arrives, which edits at earlier layers have changed. All edits of a layer act together.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field, ValidationError
from torch import Tensor

from mlsae.errors import ConfigError
from mlsae.explorer.answers import Dose, Index, index_of, number_of
from mlsae.explorer.inference import PromptCode, Session
from mlsae.explorer.prompts import PromptText, Request
from mlsae.lm import LanguageModel
from mlsae.metrics import kl_divergence
from mlsae.sae import MLSAE, Code

OPERATIONS = ("add", "clamp", "ablate")
N_TOKENS = 10
"""Next tokens shown."""
MAX_EDITS = 32
SPELLING = "LATENT:LAYERS:OP:DOSE as in 7:all:add:2, 7:3,4:clamp:0 or 7:3:ablate"
Replacements = dict[int, Callable[[Tensor], Tensor]]
"""What `LanguageModel.logits` takes."""


class Edit(Request):
    """What is done to a latent."""

    latent: Index
    """Which."""
    layers: Annotated[tuple[Index, ...], Field(strict=False, min_length=1, max_length=1024)] | None = None
    """The language model's layers; None: all that the latent's dictionary reads."""
    op: Literal["add", "clamp", "ablate"] = "add"
    """Add the dose to its activation, set it to the dose, or set it to 0."""
    dose: Dose = 1.0
    """In units of its own mean activation at the layer; nothing to `ablate`."""

    @classmethod
    def parse(cls, text: str) -> "Edit":
        """The edit that a text such as `7:3,4:add:2` spells. Raises ConfigError if it spells none."""
        latent, layers, op, *dose = [*text.split(":"), "", ""][: max(3, text.count(":") + 1)]
        if op not in OPERATIONS or len(dose) > 1 or (not dose and op != "ablate"):
            raise ConfigError("edit", f"'{text[:60]}'; write {SPELLING}")
        try:
            where = None if layers == "all" else tuple(map(index_of, layers.split(",")))
            return cls(latent=index_of(latent), layers=where, op=op, dose=number_of(dose[0]) if dose else 0.0)
        except ValueError as error:  # pydantic's are too
            said = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            raise ConfigError(
                "edit", f"'{text[:60]}': {said.removeprefix('Value error, ')}; write {SPELLING}"
            ) from error

    def __str__(self) -> str:
        layers = "all" if self.layers is None else ",".join(map(str, self.layers))
        return f"{self.latent}:{layers}:{self.op}:{self.dose!r}"


Edits = Annotated[tuple[Edit, ...], Field(strict=False, max_length=MAX_EDITS)]


class SteerRequest(Request):
    """Of `steer_view`."""

    text: PromptText
    """The prompt."""
    edits: Edits = ()
    """What is done, in whatever order."""
    reconstruct: bool = False
    """Also replace every layer by the SAE's reconstruction of it."""
    n_new: Annotated[int, Field(ge=0, le=64)] = 20
    """Tokens to go on for."""
    pos: Index | None = None
    """The position whose next token is looked at; None: the last."""


# ---- doses -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dosed:
    """An edit, and the unit of its dose at each of its layers."""

    edit: Edit
    layers: tuple[int, ...]
    units: tuple[float, ...]
    unit_from: str
    """`analysis`, `prompt`, or `none` where the latent was active in neither."""

    def to_dict(self) -> dict[str, Any]:
        """As the page has it."""
        return {
            "latent": self.edit.latent,
            "layers": list(self.layers),
            "op": self.edit.op,
            "dose": self.edit.dose,
            "unit": list(self.units),
            "unit_from": self.unit_from,
        }


def dosed(session: Session, edits: Sequence[Edit], code: PromptCode) -> list[Dosed]:
    """Edits with their units: the latent's mean activation at the layer, where it is active.

    If it never is at that layer, over all layers; without an analysis, or if that never saw it, over the prompt; else 1.
    Raises ConfigError for a latent or layer that is not there.
    """
    sae = session.sae()
    found = []
    for number, edit in enumerate(edits):
        session.check_latent(edit.latent, f"edits.{number}.latent")
        own = layers_of(sae, edit.latent)
        for layer in () if edit.layers is None else edit.layers:
            if layer not in own:
                allowed = f"latent {edit.latent} is read at layers {own[0]} to {own[-1]}"
                raise ConfigError(f"edits.{number}.layers", f"{layer}; {allowed} of this SAE")
        layers = own if edit.layers is None else tuple(sorted(set(edit.layers)))
        rows = [sae.layers.index(layer) for layer in layers]
        units, unit_from = _analysed(session, edit.latent), "analysis"
        if units is None:
            units, unit_from = _on_prompt(code, edit.latent), "prompt"
        if units is None:
            units, unit_from = [1.0] * len(sae.layers), "none"
        found.append(Dosed(edit, layers, tuple(units[row] for row in rows), unit_from))
    return found


def layers_of(sae: MLSAE, latent: int) -> tuple[int, ...]:
    """The layers whose dictionary has the latent: all, but for an SAE of several groups."""
    group = latent // (sae.config.n_latents // sae.config.groups)
    return tuple(layer for row, layer in enumerate(sae.layers) if sae.config.group_of(row) == group)


def _analysed(session: Session, latent: int) -> list[float] | None:
    if (statistics := session.library.statistics) is None:
        return None
    sums = statistics.of(latent)
    return _means(*(sums[name].flatten().tolist() for name in ("counts", "totals")))


def _on_prompt(code: PromptCode, latent: int) -> list[float] | None:
    here = (code.indices == latent) & (code.values > 0) & code.visible[:, None]
    sums = code.values.double().where(here, 0.0).sum((1, 2)).tolist()
    return _means(here.sum((1, 2)).tolist(), sums)


def _means(counts: Sequence[int | float], sums: Sequence[float]) -> list[float] | None:
    """By layer; where nothing was counted, over all layers; None if nothing was."""
    if not sum(counts) > 0:
        return None
    overall = sum(sums) / sum(counts)
    return [total / count if count > 0 else overall for count, total in zip(counts, sums, strict=True)]


# ---- edits in a forward pass -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """What is done to some latents at one layer: `z_new = base + added`, where base is `z_old` or, if set, `fixed`."""

    latents: tuple[int, ...]
    fixed: tuple[float | None, ...]
    added: tuple[float, ...]

    @property
    def reads(self) -> bool:
        """Whether what is done depends on `z_old`."""
        return any(value is not None for value in self.fixed)

    def delta(self, code: Code) -> Float[Tensor, "1 token edited"]:
        """`z_new - z_old` of each latent."""
        columns = []
        for latent, fixed, added in zip(self.latents, self.fixed, self.added, strict=True):
            old = code.values.where(code.indices == latent, 0.0).sum(-1)
            columns.append(torch.full_like(old, added) if fixed is None else fixed + added - old)
        return torch.stack(columns, -1)


def changes_by_layer(edits: Sequence[Dosed]) -> dict[int, Change]:
    """All edits of each layer as one, so that their order does not matter. Raises ConfigError if two contradict each other."""
    fixed: dict[tuple[int, int], float] = {}
    added: dict[tuple[int, int], list[float]] = {}
    for each in edits:
        for layer, unit in zip(each.layers, each.units, strict=True):
            place = layer, each.edit.latent
            if each.edit.op == "add":
                added.setdefault(place, []).append(each.edit.dose * unit)
                continue
            value = 0.0 if each.edit.op == "ablate" else each.edit.dose * unit
            if fixed.setdefault(place, value) != value:
                raise ConfigError("edits", f"latent {place[1]} is set to two values at layer {layer}; keep one of them")
    found: dict[int, Change] = {}
    for layer in sorted({place[0] for place in (*fixed, *added)}):
        latents = tuple(sorted({latent for at, latent in (*fixed, *added) if at == layer}))
        places = [(layer, latent) for latent in latents]
        sums = tuple(math.fsum(added.get(place, ())) for place in places)
        found[layer] = Change(latents, tuple(fixed.get(place) for place in places), sums)
    return found


def replacements(
    sae: MLSAE, changes: Mapping[int, Change], where: Bool[Tensor, "batch pos"], *, reconstruct: bool = False
) -> Replacements:
    """What each layer is replaced by, where `where` says so; layers that nothing is done to are not named."""

    def replace(layer: int) -> Callable[[Tensor], Tensor]:
        def replaced(resid: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
            if not where.any():
                return resid
            flowing = resid[where][None]
            reads = reconstruct or changes[layer].reads
            code = sae.encode(flowing, layers=[layer]) if reads else nothing(sae, flowing, layer)
            edited = sae.decode(code) if reconstruct else flowing
            if layer in changes:
                edited = edited + contribution(sae, code, changes[layer])
            resid = resid.clone()
            resid[where] = edited[0]
            return resid

        return replaced

    return {layer: replace(layer) for layer in (sae.layers if reconstruct else changes)}


def nothing(sae: MLSAE, resid: Float[Tensor, "1 token d_model"], layer: int) -> Code:
    """A code in which no latent is active, with the frame of these vectors: to add to, `encode`'s cost is not needed."""
    rows = sae.rows(resid, [layer])
    shift, scale = sae.frame.shift_and_scale(sae.lensed(resid, [layer]), rows)
    values = resid.new_zeros(*resid.shape[:-1], 1)
    return Code(values, torch.zeros_like(values, dtype=torch.int64), shift, scale, tuple(rows), sae.config.n_latents)


def contribution(sae: MLSAE, code: Code, change: Change) -> Float[Tensor, "1 token d_model"]:
    """`decode(changed code) - decode(code)`, which is linear in the change: through the frame and back from the lens."""
    framed = change.delta(code) @ sae.W_dec[list(change.latents)].detach()
    return along(sae, framed * code.scale, [sae.layers[row] for row in code.rows])


def along(
    sae: MLSAE, moved: Float[Tensor, "layer token d_model"], layers: Sequence[int]
) -> Float[Tensor, "layer token d_model"]:
    """A displacement behind the lens as it is in the residual stream: itself, where the SAE has no lens."""
    if sae.lens is None:
        return moved
    return sae.lens.invert(moved, layers) - sae.lens.invert(torch.zeros_like(moved), layers)


# ---- the page --------------------------------------------------------------------------------------------------------


def steer_view(session: Session, request: SteerRequest) -> dict[str, Any]:
    """Next tokens at one position and the greedy continuation, untouched and with edits made."""
    started = time.monotonic()
    code = session.code_of(request.text)
    n_pos = len(code.ids)
    pos = n_pos - 1 if request.pos is None else request.pos
    if pos >= n_pos:
        raise ConfigError("pos", f"{pos}; the prompt has positions 0 to {n_pos - 1}")
    if n_pos + request.n_new > (limit := session.max_tokens()):
        raise ConfigError("n_new", f"{request.n_new} after a prompt of {n_pos} tokens; {limit} are possible in all")
    edits = dosed(session, request.edits, code)
    changes = changes_by_layer(edits)
    session.expect(2 * max(1, request.n_new))
    clean, untouched = _go_on(session, code, request.n_new, {}, reconstruct=False)
    steered, changed = clean, untouched
    if changes or request.reconstruct:
        steered, changed = _go_on(session, code, request.n_new, changes, reconstruct=request.reconstruct)
    lm = session.lm()
    strings = lm.tokenizer.strings
    return {
        "tokens": code.tokens(),
        "pos": pos,
        "edits": [each.to_dict() for each in edits],
        "next": next_tokens(lm, clean[pos], steered[pos]),
        "continuation": {"clean": {"tokens": strings(untouched)}, "steered": {"tokens": strings(changed)}},
        "seconds": time.monotonic() - started,
    }


def _go_on(
    session: Session, code: PromptCode, n_new: int, changes: Mapping[int, Change], *, reconstruct: bool
) -> tuple[Float[Tensor, "pos d_vocab"], list[int]]:
    """The prompt's logits, and the tokens that the likeliest next ones make, up to a special one."""
    lm, sae = session.lm(), session.sae()
    tokens = torch.tensor([code.ids], device=lm.device)
    visible = code.visible[None].to(lm.device)
    prompted, past = None, lm.begin()
    while True:
        where = torch.nn.functional.pad(visible, (0, tokens.shape[1] - len(code.ids)), value=True)
        last = None if prompted is None else 1  # of what was already there, nothing is asked again
        n_asked = 1 if past is not None and last == 1 else tokens.shape[1]
        replace = replacements(sae, changes, where[:, -n_asked:], reconstruct=reconstruct)
        found = lm.logits(tokens[:, -n_asked:], replace, last=last, past=past)
        session.step()
        prompted = found[0] if prompted is None else prompted
        new = tokens[0, len(code.ids) :].tolist()
        if len(new) == n_new:
            return prompted, new
        following = int(found[0, -1].argmax())
        tokens = torch.cat([tokens, tokens.new_tensor([[following]])], 1)
        if len(new) + 1 == n_new or following in lm.tokenizer.special_ids:
            return prompted, [*new, following]


def next_tokens(
    lm: LanguageModel, clean: Float[Tensor, " d_vocab"], steered: Float[Tensor, " d_vocab"]
) -> dict[str, Any]:
    """The likeliest next tokens of two distributions, those whose probability changes most, and KL(clean, steered)."""
    before, after = (x.float().log_softmax(-1) for x in (clean, steered))
    p, q = before.exp(), after.exp()
    ids = (q - p).abs().topk(min(N_TOKENS, len(p))).indices
    columns = zip(ids.tolist(), lm.tokenizer.strings(ids.tolist()), p[ids].tolist(), q[ids].tolist(), strict=True)
    return {
        "clean": likeliest(lm, p, N_TOKENS),
        "steered": likeliest(lm, q, N_TOKENS),
        "changes": [{"id": i, "string": string, "clean": a, "steered": b} for i, string, a, b in columns],
        "kl": float(kl_divergence(before, after)),
    }


def likeliest(lm: LanguageModel, p: Float[Tensor, " d_vocab"], n: int) -> list[dict[str, Any]]:
    """The tokens of largest probability."""
    values, ids = p.topk(min(n, len(p)))
    columns = zip(ids.tolist(), lm.tokenizer.strings(ids.tolist()), values.tolist(), strict=True)
    return [{"id": i, "string": string, "p": x} for i, string, x in columns]
