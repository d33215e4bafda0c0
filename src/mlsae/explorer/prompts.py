"""What a prompt activates at every layer and position, two prompts side by side, and what one latent goes with and says."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from mlsae.analysis.example_file import read_about, read_examples
from mlsae.errors import ModelError
from mlsae.explorer.answers import Index
from mlsae.explorer.inference import PromptCode, Session, problem_of
from mlsae.reading import read

N_LATENTS, N_COLUMNS = 50, 256
"""Latents listed, and in the heatmap of a prompt."""
MAX_PAIRS = 40_000
"""Pairs of latent and value in one answer: a long prompt is given fewer than it asks for at each position."""
MAX_CONTEXTS = 32
"""Contexts in which co-active latents are counted."""


def _checked(text: Any) -> Any:
    """A text, refused with the place of what is wrong with it; anything else is left for the type check."""
    if isinstance(text, str) and (problem := problem_of(text)) is not None:
        raise PydanticCustomError("text", "{problem}", {"problem": problem})
    return text


PromptText = Annotated[str, BeforeValidator(_checked)]
"""A text that can be a prompt, as far as that shows before it is tokenized."""


class Request(BaseModel):
    """What a page asks for: unknown fields, other types and numbers that are not finite are refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class PromptRequest(Request):
    """Of `prompt_view`."""

    text: PromptText
    """The prompt."""
    latent: Index | None = None
    """A latent whose every activation is wanted."""
    top: Annotated[int, Field(ge=1, le=32)] = 8
    """Strongest latents at each layer and position."""


class CompareRequest(Request):
    """Of `compare_view`."""

    text: PromptText
    """One prompt."""
    other: PromptText
    """The other."""


# ---- a prompt --------------------------------------------------------------------------------------------------------


def prompt_view(session: Session, request: PromptRequest) -> dict[str, Any]:
    """Tokens, quality, activity and the strongest latents of a prompt, by layer and position.

    `quality.fvu` is `evaluate`'s over the prompt's visible positions, and the visible entries of `quality.error` average to it;
    `activity` is `analyze`'s of a prompt. Masked positions are shown, but counted nowhere.
    """
    session.check_latent(request.latent)
    code = session.code_of(request.text)
    layers = list(session.sae().layers)
    cells = Cells.of(code, seen=True)
    totals = Totals.of(cells, len(layers))
    return {
        "text": request.text,
        "tokens": code.tokens(),
        "layers": layers,
        "quality": _quality(code),
        "activity": [_short(row) for row in code.values.sum(-1, dtype=torch.float64).tolist()],
        "top": _top(code, request.top),
        "latents": [totals.describe(row, layers) for row in totals.largest(N_LATENTS).tolist()],
        "heatmap": _heatmap(totals),
        "latent": None if request.latent is None else _cells_of(code, request.latent),
    }


def compare_view(session: Session, request: CompareRequest) -> dict[str, Any]:
    """Two prompts: how many latents both activate, and those whose activation per visible token differs most."""
    n_layers = len(session.sae().layers)
    codes = [session.code_of(text) for text in (request.text, request.other)]
    totals = [Totals.of(Cells.of(code, seen=True), n_layers) for code in codes]
    ids = np.union1d(*(each.latents for each in totals))
    a, b = (each.per_token(ids, code.n_visible) for each, code in zip(totals, codes, strict=True))
    difference = np.abs(a.sum(0) - b.sum(0))
    order = np.lexsort((ids, -difference))[:N_LATENTS]
    both, only_a = (f(totals[0].latents, totals[1].latents, assume_unique=True) for f in (np.intersect1d, np.setdiff1d))
    return {
        **{
            name: {"text": text, "n_visible": code.n_visible}
            for name, text, code in zip("ab", (request.text, request.other), codes, strict=True)
        },
        "both": len(both),
        "only_a": len(only_a),
        "only_b": len(ids) - len(both) - len(only_a),
        "latents": [
            {
                "latent": int(ids[i]),
                **{name: float(x[:, i].sum()) for name, x in (("a", a), ("b", b))},
                **{f"by_layer_{name}": _short(x[:, i]) for name, x in (("a", a), ("b", b))},
            }
            for i in order
        ],
    }


def _quality(code: PromptCode) -> dict[str, Any]:
    n_visible = code.n_visible
    per_token = [x / n_visible if n_visible and x > 0 else None for x in code.deviation.tolist()]
    visible = code.visible.tolist()
    active = (code.values > 0).sum(-1)[:, code.visible].double()
    error, fvu = code.error.tolist(), []
    for row, unit in zip(error, per_token, strict=True):
        row[:] = [e / unit if unit is not None and seen else None for e, seen in zip(row, visible, strict=True)]
        fvu.append(None if unit is None else sum(e for e in row if e is not None) / n_visible)
    l0 = active.mean(1).tolist() if n_visible else [None] * len(error)
    return {"fvu": fvu, "l0": l0, "error": [_short(row) for row in error]}


def _top(code: PromptCode, n: int) -> list[list[list[list[int | float]]]]:
    """[layer][pos] -> the n strongest, as many as the answer has room for, strongest first."""
    n_layers, n_pos, width = code.values.shape
    n = min(n, width, MAX_PAIRS // (n_layers * n_pos))
    values, indices = code.values[..., :n].tolist(), code.indices[..., :n].tolist()
    return [
        [
            [[latent, _digits(value)] for latent, value in zip(of_indices, of_values, strict=True) if value > 0]
            for of_indices, of_values in zip(row_indices, row_values, strict=True)
        ]
        for row_indices, row_values in zip(indices, values, strict=True)
    ]


def _cells_of(code: PromptCode, latent: int) -> dict[str, Any]:
    cells = Cells.of(code, seen=False).only(latent)
    rows = zip(cells.row.tolist(), cells.pos.tolist(), _short(cells.value), strict=True)
    return {"latent": latent, "cells": [list(row) for row in rows]}


def _heatmap(totals: "Totals") -> dict[str, Any]:
    chosen = totals.largest(N_COLUMNS)
    chosen = chosen[np.lexsort((totals.latents[chosen], totals.centre_of_mass[chosen]))]
    return {"latents": totals.latents[chosen].tolist(), "mass": [_short(row) for row in totals.by_layer[:, chosen]]}


@dataclass(frozen=True)
class Cells:
    """Where which latent is active: one entry for each (layer, position, latent) with a value above 0."""

    row: Int64[np.ndarray, " cell"]
    pos: Int64[np.ndarray, " cell"]
    latent: Int64[np.ndarray, " cell"]
    value: Float[np.ndarray, " cell"]

    @classmethod
    def of(cls, code: PromptCode, *, seen: bool) -> "Cells":
        """Those of a prompt, or of what the SAE sees of it."""
        active = code.values > 0
        if seen:
            active &= code.visible[:, None]
        row, pos, _ = (x.numpy() for x in active.nonzero(as_tuple=True))
        return cls(row, pos, code.indices[active].numpy().astype(np.int64), code.values[active].numpy())

    def only(self, latent: int) -> "Cells":
        """Those of one latent, by layer and position."""
        here = self.latent == latent
        return Cells(self.row[here], self.pos[here], self.latent[here], self.value[here])


@dataclass(frozen=True)
class Totals:
    """Cells added up by latent."""

    latents: Int64[np.ndarray, " latent"]
    """Those that are active at all, by id."""
    by_layer: Float[np.ndarray, "layer latent"]
    """Summed activation."""
    n_cells: Int64[np.ndarray, " latent"]
    peak: Float[np.ndarray, " latent"]
    peak_row: Int64[np.ndarray, " latent"]
    peak_pos: Int64[np.ndarray, " latent"]
    """The largest activation, and where: of equal ones the first layer, then the first position."""

    @classmethod
    def of(cls, cells: Cells, n_layers: int) -> "Totals":
        """Sums over cells, in float64."""
        latents, which = np.unique(cells.latent, return_inverse=True)
        n = len(latents)
        mass = np.bincount(cells.row * n + which, cells.value.astype(np.float64), minlength=n_layers * n)
        order = np.lexsort((cells.pos, cells.row, -cells.value, which))
        first = order[np.searchsorted(which[order], np.arange(n))]
        return cls(
            latents,
            mass.reshape(n_layers, n).astype(np.float64),
            np.bincount(which, minlength=n),
            cells.value[first],
            cells.row[first],
            cells.pos[first],
        )

    @cached_property
    def mass(self) -> Float[np.ndarray, " latent"]:
        """Summed activation over all layers."""
        return self.by_layer.sum(0)

    @cached_property
    def centre_of_mass(self) -> Float[np.ndarray, " latent"]:
        """Mean place among the layers, weighted by activation."""
        return np.arange(len(self.by_layer)) @ self.by_layer / self.mass

    def largest(self, n: int) -> Int64[np.ndarray, " chosen"]:
        """Places of the n of largest mass; ties by id."""
        return np.lexsort((self.latents, -self.mass))[:n]

    def per_token(self, ids: Int64[np.ndarray, " id"], n_tokens: int) -> Float[np.ndarray, "layer id"]:
        """Activation per token of some latents, 0 where one is not active."""
        found = np.zeros((len(self.by_layer), len(ids)))
        found[:, np.searchsorted(ids, self.latents)] = self.by_layer / max(1, n_tokens)
        return found

    def describe(self, at: int, layers: Sequence[int]) -> dict[str, Any]:
        """One of them, as the page has it."""
        return {
            "latent": int(self.latents[at]),
            "mass": float(self.mass[at]),
            "peak": float(self.peak[at]),
            "peak_layer": layers[self.peak_row[at]],
            "peak_pos": int(self.peak_pos[at]),
            "n_cells": int(self.n_cells[at]),
            "centre_of_mass": float(np.interp(self.centre_of_mass[at], range(len(layers)), layers)),
            "by_layer": _short(self.by_layer[:, at]),
        }


# ---- a latent's company ----------------------------------------------------------------------------------------------


def coactive_view(session: Session, latent: int) -> dict[str, Any]:
    """Which other latents are active where this one is: at the same layer and token of its strongest contexts.

    The contexts are read again, cut from their text: at most 32, masked as always. `share` is of the `cells` (layer, token)
    where this latent is active, `lift` that share over the other's density at those layers.
    """
    session.check_latent(latent)
    path, statistics = session.library.examples, session.library.statistics
    if path is None:
        missing = session.library.missing("analysis", "examples")
        return {"latent": latent, "contexts": 0, "tokens": 0, "cells": 0, "coactive": [], "missing": missing}
    contexts = _contexts(session, path, latent)
    together, cells, n_tokens = _count_together(session, contexts, latent)
    order = np.lexsort((np.arange(len(together)), -together))[: N_LATENTS + 1]
    chosen = torch.from_numpy(order[(together[order] > 0) & (order != latent)][:N_LATENTS])
    W_dec, n_cells = session.sae().W_dec.detach().cpu(), cells.sum()
    cosines = torch.nn.functional.cosine_similarity(W_dec[chosen], W_dec[latent][None])
    expected = [_expected(statistics, cells, other) for other in chosen.tolist()]
    rows = zip(chosen.tolist(), together[chosen], expected, cosines.tolist(), strict=True)
    return {
        "latent": latent,
        "contexts": len(contexts),
        "tokens": n_tokens,
        "cells": int(n_cells),
        "coactive": [
            {
                "latent": other,
                "share": float(count / n_cells),
                "lift": float(count / chance) if chance > 0 else None,
                "cosine": cosine,
            }
            for other, count, chance, cosine in rows
        ],
        "missing": [],
    }


def _expected(statistics: Any, cells: Float[np.ndarray, " layer"], other: int) -> float:
    """In how many of the cells another latent would be active by chance; 0 where that is not known."""
    if statistics is None or not statistics.n_tokens:
        return 0.0
    return float(cells @ statistics.of(other)["counts"].flatten().double().numpy()) / statistics.n_tokens


def _contexts(session: Session, path: Path, latent: int) -> list[list[int]]:
    """Token ids of the latent's strongest contexts, each once, cut to what the language model takes."""
    lm, room = session.lm(), session.max_tokens() - 1
    if read_about(path).tokenizer_fingerprint != lm.tokenizer.fingerprint:
        raise ModelError("examples", f"were made with another tokenizer than that of {Path(lm.name).name}")
    found: dict[tuple[int, ...], None] = {}
    for example in sorted(read_examples(path, latent), key=lambda example: -example.value):
        first = max(0, min(example.centre - room // 2, len(example.tokens) - room))
        found.setdefault(tuple(example.tokens[first : first + room]))
    contexts = [list(tokens) for tokens in found][:MAX_CONTEXTS]
    if any(not 0 <= i < lm.d_vocab for tokens in contexts for i in tokens):
        raise ModelError("examples", f"name tokens that {Path(lm.name).name} does not have")
    return contexts


def _count_together(
    session: Session, contexts: list[list[int]], latent: int
) -> tuple[Float[np.ndarray, " n_latents"], Float[np.ndarray, " layer"], int]:
    """Cells where each latent and this one are active, cells by layer where this one is, and at how many tokens."""
    sae, lm = session.sae(), session.lm()
    together, cells = np.zeros(sae.config.n_latents), np.zeros(len(sae.layers))
    n_tokens, bos = 0, lm.tokenizer.bos_id
    session.expect(len(contexts))
    for tokens in contexts:
        start = [] if bos is None or tokens[:1] == [bos] else [bos]
        reading = read(lm, sae, torch.tensor([start + tokens]))
        if reading.vectors.shape[1]:
            code = sae.encode(reading.vectors)
            active = code.values > 0
            here = ((code.indices == latent) & active).any(-1)
            together += np.bincount(code.indices[here][active[here]].cpu().numpy(), minlength=len(together))
            cells += here.sum(1).cpu().numpy()
            n_tokens += int(here.any(0).sum())
        session.step()
    return together, cells, n_tokens


def _digits(x: float) -> float:
    return float(f"{x:.8g}")


def _short(row: Any) -> list[float | None]:
    """Numbers with the digits that float32 has, and no more."""
    numbers = row.tolist() if isinstance(row, np.ndarray) else row
    return [None if x is None else _digits(x) for x in numbers]
