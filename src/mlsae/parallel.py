"""One SAE over several processes: each of the mesh's tp ranks holds some latents of every group, and all of them make one code.

Encoding is the exact top k: every rank takes the k largest of its own latents, one all-gather carries these (value, latent)
pairs of all layers, and all ranks choose the same k of them, the lower latent where values tie, as one process does. Decoding is
sparse: every rank adds up its own latents' rows, and one all-reduce adds up these sums of d_model entries. So a forward pass of
all layers takes two collectives, and another two for AuxK while a latent is dead; derivatives need none (mesh.py).
"""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mlsae import ops
from mlsae.config import Impl, MLSAEConfig
from mlsae.errors import ConfigError
from mlsae.frames import Frame, Lens
from mlsae.mesh import Mesh
from mlsae.sae import MLSAE, Code, Part, by_token, joined

DRAWN_ENTRIES = 1 << 20
"""Entries of the initial weights that are drawn at a time: every rank draws all, in order, and keeps its own."""
SHARDED = ("W_enc", "W_dec")
"""Weights with one row for each latent."""


def make_sae(config: MLSAEConfig, mesh: Mesh) -> MLSAE:
    """A new SAE, or this rank's share of it; the random numbers, and those that follow, are the same either way."""
    return MLSAE(config) if mesh.tp == 1 else ShardedSAE(config, mesh)


class ShardedSAE(MLSAE):
    """This rank's latents of an SAE. Codes name those of the whole, and all tp ranks must encode and decode together.

    Of every group's latents a rank has a run, and runs differ in length by one at most; `W_enc` and `W_dec` hold them, group
    after group. All else is the same on every rank.
    """

    def __init__(self, config: MLSAEConfig, mesh: Mesh):
        size = config.n_latents // config.groups
        if size < mesh.tp:
            raise ConfigError("tp", f"{mesh.tp} exceeds the {size} latents of a dictionary; lower it")
        with torch.device("meta"):
            super().__init__(config)
        self.mesh, self.size = mesh, size
        self.share = mesh.share(size, "tp")
        """Which of a group's latents this rank holds."""
        self.n_own = self.share.stop - self.share.start
        self.widest = -(-size // mesh.tp)
        """The most that any rank holds."""
        self.W_enc = nn.Parameter(self._drawn())
        self.W_dec = nn.Parameter(nn.functional.normalize(self.W_enc.detach()))
        self.b_pre = nn.Parameter(torch.zeros(self.b_pre.shape))
        n_layers = len(config.layers or ())
        self.frame = Frame(config.frame, n_layers, config.d_model)
        self.lens = None if config.lens is None else Lens(self.layers, config.d_model)
        self.norm_limit = torch.full((n_layers,), torch.inf)

    def _drawn(self) -> Float[Tensor, "own d_model"]:
        """This rank's rows of the random numbers that a whole W_enc begins with."""
        d_model, bound = self.config.d_model, self.config.d_model**-0.5
        own = torch.empty(self.config.groups * self.n_own, d_model)
        ids, at = self.latents(), 0
        step = max(1, DRAWN_ENTRIES // d_model)
        for start in range(0, self.config.n_latents, step):
            rows = torch.empty(min(step, self.config.n_latents - start), d_model).uniform_(-bound, bound)
            here = ids[(ids >= start) & (ids < start + len(rows))] - start
            own[at : at + len(here)] = rows[here]
            at += len(here)
        return own

    def latents(self) -> Int[Tensor, " own"]:
        """The latent of each row of this rank's weights."""
        groups = torch.arange(self.config.groups)[:, None] * self.size
        return (groups + torch.arange(self.share.start, self.share.stop)).flatten()

    def first(self, part: Part) -> int:
        """The lowest latent that this rank holds of a part's group."""
        return part.group * self.size + self.share.start

    def of(self, part: Part, weight: Float[Tensor, "own d_model"]) -> Float[Tensor, "latent d_model"]:
        """This rank's rows of a part's group: all of them, and no copy of their gradient, when there is one."""
        return weight if self.config.groups == 1 else weight[part.group * self.n_own : (part.group + 1) * self.n_own]

    # ---- encode ------------------------------------------------------------------------------------------------------

    def encode_lensed(
        self, resid: Float[Tensor, "layer *batch d_model"], layers: Sequence[int] | None = None, *, impl: Impl = "auto"
    ) -> Code:
        """`encode` of what `lensed` gave. Only values of this rank's own latents carry a gradient."""
        rows = self.rows(resid, layers)
        shift, scale = self.frame.shift_and_scale(resid, rows)
        width = min(self.config.k, self.widest)
        found = []
        for part in self.parts(rows):
            values, indices = _in_order(
                *self.encode_part(
                    resid, shift, scale, part, self.of(part, self.W_enc), min(self.config.k, self.n_own), impl
                )
            )
            spare = (0, width - values.shape[-1])
            pad = nn.functional.pad
            found.append((pad(values, spare), pad(indices, spare) + self.first(part)))
        values, indices = (joined(tensors) for tensors in zip(*found, strict=True))
        whole = torch.int64 if values.element_size() == 8 else torch.int32
        values = values if values.element_size() in (4, 8) else values.float()
        pairs = self.mesh.gathered(torch.stack([values.detach().view(whole), indices.to(whole)]))
        latents = torch.cat([pair[1] for pair in pairs], -1).long()
        values = self._beside([pair[0].view(values.dtype) for pair in pairs], values)
        top = _largest(values, self.config.k)
        shape = (*resid.shape[:-1], top.shape[-1])
        values, latents = values.gather(-1, top).view(shape), latents.gather(-1, top).view(shape)
        return Code(values, latents, shift, scale, tuple(rows), self.config.n_latents)

    def _beside(self, found: list[Tensor], mine: Tensor) -> Tensor:
        """Every rank's candidates, one rank's after the other's; mine have their derivative."""
        return torch.cat([*found[: self.mesh.tp_rank], mine, *found[self.mesh.tp_rank + 1 :]], -1)

    # ---- decode ------------------------------------------------------------------------------------------------------

    def decode_lensed(self, code: Code, *, impl: Impl = "auto") -> Float[Tensor, "layer *batch d_model"]:
        """`lensed(decode(code))`, without the way there and back."""
        framed = self._framed(code, impl).view(*code.values.shape[:-1], self.config.d_model)
        bias = self.layer_biases(code).view(len(code.rows), *[1] * (framed.ndim - 2), -1)
        return (framed + bias) * code.scale + code.shift

    def error(
        self, resid: Float[Tensor, "layer *batch d_model"], code: Code, *, impl: Impl = "auto"
    ) -> tuple[Float[Tensor, "layer *batch d_model"], Float[Tensor, " layer"]]:
        """`resid - decode_lensed(code)`, and its squared sum over each layer."""
        error = resid - self.decode_lensed(code, impl=impl)
        return error, error.square().flatten(1).sum(1)

    def layer_biases(self, code: Code) -> Float[Tensor, "layer 1 d_model"]:
        """The bias of each layer's group. All tp ranks add the same one, so only the first has its derivative."""
        biases = self.biases if self.mesh.tp_rank == 0 else self.biases.detach()
        return torch.cat([biases[part.group].expand(part.n_layers, 1, -1) for part in self.parts(code.rows)])

    def _framed(self, code: Code, impl: Impl) -> Float[Tensor, "layer token d_model"]:
        """`code @ W_dec`, whole."""
        sums = []
        for part in self.parts(code.rows):
            values, indices = by_token(part.of(code.values)), by_token(part.of(code.indices)) - self.first(part)
            mine = (indices >= 0) & (indices < self.n_own) & (values > 0)
            sums.append(_decoded(values, indices, mine, self.of(part, self.W_dec), impl))
        return self.mesh.total(joined(sums), "tp")

    # ---- dead latents ------------------------------------------------------------------------------------------------

    def decode_dead(
        self,
        resid: Float[Tensor, "layer token d_model"],
        code: Code,
        dead: Bool[Tensor, " n_latents"],
        k_aux: int,
        impl: Impl,
    ) -> Float[Tensor, "layer token d_model"]:
        """The sum of the `k_aux` most active dead latents of each layer's group, in the frame; 0 where none is dead."""
        counts = self._dead_counts(dead)
        width = min(k_aux, int(counts.max()))
        parts = self.parts(code.rows)
        found, places = [], []
        for part, ids in zip(parts, self._dead_rows(parts, dead), strict=True):
            n = min(width, len(ids))
            values = resid.new_zeros(part.n_layers, resid.shape[1], 0)
            indices = torch.zeros(values.shape, dtype=torch.int64, device=values.device)
            if n:
                W_enc = self.W_enc[ids]
                values, indices = _in_order(*self.encode_part(resid, code.shift, code.scale, part, W_enc, n, impl))
            found.append(nn.functional.pad(values, (0, width - n)))
            places.append(nn.functional.pad(indices, (0, width - n)))
        values = joined(found)
        everyone = self._beside(self.mesh.gathered(values), values)
        chosen = _chosen(everyone.detach(), [min(k_aux, int(counts[:, part.group].sum())) for part in parts], parts)
        first = self.mesh.tp_rank * width
        chosen = chosen[..., first : first + width] & (values > 0)
        sums = []
        for part, ids, indices in zip(parts, self._dead_rows(parts, dead), places, strict=True):
            if len(ids) == 0:
                sums.append(torch.zeros_like(resid[part.here]))
            else:
                sums.append(_decoded(values[part.here], indices, chosen[part.here], self.W_dec[ids], impl))
        return self.mesh.total(joined(sums), "tp")

    def _dead_counts(self, dead: Bool[Tensor, " n_latents"]) -> Int[Tensor, "tp group"]:
        """How many dead latents every rank holds of each group."""
        by_group = dead.view(self.config.groups, self.size).cpu()
        return torch.stack([by_group[:, share].sum(1) for share in self.mesh.shares(self.size)])

    def _dead_rows(self, parts: list[Part], dead: Bool[Tensor, " n_latents"]) -> Iterator[Int[Tensor, " dead"]]:
        """The rows of this rank's weights that hold each part's dead latents."""
        for part in parts:
            mine = dead[self.first(part) : self.first(part) + self.n_own]
            yield mine.nonzero().flatten() + part.group * self.n_own


def _in_order(values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Candidates by ascending latent, so that a stable sort by value puts the lower latent first where values tie."""
    indices, order = indices.sort(-1)
    return values.gather(-1, order), indices


def _largest(values: Float[Tensor, "*axes candidate"], k: int) -> Int[Tensor, "*axes k"]:
    """Where the k largest are; of equal ones the first."""
    return values.detach().sort(dim=-1, descending=True, stable=True).indices[..., :k]


def _chosen(
    values: Float[Tensor, "layer token candidate"], ks: list[int], parts: list[Part]
) -> Bool[Tensor, "layer token candidate"]:
    """Whether each candidate is among the k largest, k being each part's own."""
    chosen = torch.zeros(values.shape, dtype=torch.bool, device=values.device)
    for part, k in zip(parts, ks, strict=True):
        chosen[part.here] = chosen[part.here].scatter(-1, _largest(values[part.here], k), True)
    return chosen


def _decoded(
    values: Float[Tensor, "layer token k"],
    indices: Int[Tensor, "layer token k"],
    mine: Bool[Tensor, "layer token k"],
    W_dec: Float[Tensor, "latent d_model"],
    impl: Impl,
) -> Float[Tensor, "layer token d_model"]:
    """The sum over the entries that are mine, and no more of the others than the fullest row needs."""
    width = int(mine.sum(-1).max()) if mine.numel() else 0
    if width == 0:
        return values.new_zeros(*values.shape[:2], W_dec.shape[1]) + 0.0 * (values.sum() + W_dec.sum())
    order = mine.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices[..., :width]
    values = values.where(mine, 0.0).gather(-1, order)
    indices = indices.where(mine, 0).gather(-1, order)
    return ops.decode(values.flatten(0, 1), indices.flatten(0, 1), W_dec, impl).view(*values.shape[:2], W_dec.shape[1])
