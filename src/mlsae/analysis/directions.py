"""Decoder rows compared with each other and with chance: near-duplicates, and cosine against distance in depth.

All pairs of latents are visited once, in blocks of products; nothing of [n_latents, n_latents] is ever held. Scaling a
row changes nothing, and neither does an SAE's frame, whose scale is one number a layer.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from mlsae.errors import ConfigError, NumericsError
from mlsae.reporting import bar

BLOCK = 1024
"""Latents in a block of pairs: 4 MB of float32 cosines."""
MAX_BLOCK_ELEMENTS = 1 << 24
"""Cosines held at once: 64 MB in float32."""
NEAR_DUPLICATE = 0.9
"""Cosine above which two latents say the same: each then explains over 81 % of the other's squared length."""
NULL_ROWS = 2048
"""Random directions whose largest cosines estimate what chance gives."""
PUBLISHED_WHOLE_BELOW, PUBLISHED_CHUNK = 16_384, 1_024
"""Where the code of Lawson et al. 2024 goes over to chunks of latents, and their size (defect D16)."""
BINS, GAP_BINS, COSINE_BINS, COSINE_LIMIT = 100, 64, 512, 0.25
"""All cosines on [-1, 1]; those against the difference of depth on [0, max_gap] x [-COSINE_LIMIT, COSINE_LIMIT]."""


# ---- results ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Maxima:
    """The largest cosine of each of n directions with some others, in a few numbers."""

    n: int
    mean: float
    std: float
    """Over directions, with n - 1."""
    sem: float
    """std / sqrt(n)."""
    near_duplicates: float
    """Share above NEAR_DUPLICATE."""

    @classmethod
    def of(cls, largest: Float[Tensor, " direction"]) -> "Maxima":
        """All NaN where there is no direction, or no other to compare one with."""
        x = largest.double()
        n = len(x)
        if n == 0 or x.isinf().any():
            return cls(n, math.nan, math.nan, math.nan, math.nan)
        std = x.std().item() if n > 1 else math.nan
        return cls(n, x.mean().item(), std, std / math.sqrt(n), (x > NEAR_DUPLICATE).double().mean().item())


@dataclass(frozen=True)
class Chance:
    """The same maxima of random directions, NULL_ROWS of them."""

    isotropic: Maxima
    """Uniform over all directions: what dimension and number alone give."""
    covariance: Maxima
    """Gaussian, with the mean and covariance of the decoder's unit rows: what a shared subspace adds."""


@dataclass(frozen=True)
class DepthGaps:
    """Cosines of pairs of used latents by how far apart in depth they live, |difference of centres of mass| in layers.

    Chance means that the centres are dealt out anew among the latents: every gap then expects the mean cosine of all
    pairs, give or take `chance_std` (Mantel 1967, exact), and the histogram the product of its margins.
    """

    histogram: Int[Tensor, "gap cosine"]
    """Pairs in GAP_BINS x COSINE_BINS; those beyond the axes are left out here and, beyond max_gap, below."""
    max_gap: float
    """Where the axis of gaps ends, in layers."""
    n_pairs: Int[Tensor, " gap"]
    """Pairs of each gap, whatever their cosine."""
    mean: Float[Tensor, " gap"]
    """Their mean cosine; NaN without pairs."""
    n_beyond: int
    """Pairs further apart than max_gap."""
    chance_mean: float
    """Mean cosine of all pairs of used latents."""
    chance_std: Float[Tensor, " gap"]
    """Standard deviation of `mean` by chance; NaN without pairs."""

    def to_dict(self) -> dict[str, Any]:
        """All but the histogram."""
        return {
            "max_gap": self.max_gap,
            "n_pairs": self.n_pairs.tolist(),
            "mean": self.mean.tolist(),
            "n_beyond": self.n_beyond,
            "chance_mean": self.chance_mean,
            "chance_std": self.chance_std.tolist(),
        }


@dataclass(frozen=True)
class Pairs:
    """All pairs of latents of one decoder."""

    max_cosine: Float[Tensor, " latent"]
    """max_{i != j} cos(W_dec[i], W_dec[j]), in [-1, 1]; -inf for a lone latent, 0 for a zero row among others."""
    neighbour: Int[Tensor, " latent"]
    """The i that has it, the lowest of several; -1 for a lone latent."""
    histogram: Int[Tensor, " bin"]
    """Pairs i < j by cosine, BINS on [-1, 1]."""
    lawson2024: float
    """The mean as the released code of Lawson et al. 2024 takes it: i < j only, or less, and none below 0; lower."""
    chance: Chance
    """`max_cosine` of as many random rows."""
    depth: DepthGaps | None
    """None where no centres of mass were given."""

    @property
    def mmcs(self) -> float:
        """Mean max cosine similarity, the mean of `max_cosine` (Sharkey et al. 2022); NaN for a lone latent."""
        return Maxima.of(self.max_cosine).mean

    def to_dict(self) -> dict[str, Any]:
        """All but what is a number for each latent."""
        return {
            "max_cosine": asdict(Maxima.of(self.max_cosine)),
            "chance": asdict(self.chance),
            "lawson2024": {"mmcs": self.lawson2024},
            "near_duplicate_above": NEAR_DUPLICATE,
            "histogram": self.histogram.tolist(),
            "depth": self.depth.to_dict() if self.depth else None,
        }


# ---- latents with each other -----------------------------------------------------------------------------------------


@torch.no_grad()
def compare_pairs(
    W_dec: Float[Tensor, "latent d_model"],
    centre_of_mass: Float[Tensor, " centre"] | None = None,
    *,
    max_gap: float = 5.0,
    seed: int = 0,
    block: int = BLOCK,
    progress: bool = False,
) -> Pairs:
    """Every latent's nearest other, and how the cosines of all pairs are distributed.

    Args:
        centre_of_mass: where in depth each latent lives, in layers; NaN for one never active, which `depth` leaves out.
        max_gap: where `depth` ends, in layers (Lawson et al. 2024: 5).
        seed: of the random directions behind `chance`.
        block: latents compared at once; the result does not depend on it.

    Raises:
        NumericsError: a row is not finite.
    """
    rows = unit_rows(W_dec)
    nearest, published, histogram = _Nearest(rows), _Published(rows), torch.zeros(BINS + 1, dtype=torch.int64)
    depth = None if centre_of_mass is None else _Depth(rows, centre_of_mass, max_gap)
    pairs = _block_pairs(len(rows), block)
    for here, there in bar(pairs, total=len(rows) ** 2, desc="pairs of latents", progress=progress, unit="pair"):
        cosines = rows[here] @ rows[there].T
        nearest.update(cosines, here, there)
        published.update(cosines, here, there)
        histogram += _count(_bin(_once(cosines, here, there).clamp(-1, 1), -1.0, 1.0, BINS), BINS + 1)
        if depth is not None:
            depth.update(cosines, here, there)
    found = None if depth is None else depth.result()
    by_chance = chance(rows, seed=seed)
    return Pairs(nearest.cosine.cpu(), nearest.latent.cpu(), histogram[:BINS], published.mean(), by_chance, found)


def max_cosine(W_dec: Float[Tensor, "latent d_model"]) -> Float[Tensor, " latent"]:
    """Each latent's largest cosine with another, max_{i != j} cos(W_dec[i], W_dec[j]): `Pairs.max_cosine` alone."""
    rows = unit_rows(W_dec)
    nearest = _Nearest(rows)
    for _, (here, there) in _block_pairs(len(rows), BLOCK):
        nearest.update(rows[here] @ rows[there].T, here, there)
    return nearest.cosine


def mmcs(W_dec: Float[Tensor, "latent d_model"]) -> float:
    """Mean max cosine similarity: the mean over latents of `max_cosine`, in [-1, 1]; NaN for fewer than two latents.

    mean_j max_{i != j} cos(W_dec[i], W_dec[j])                  (Sharkey et al. 2022, of a dictionary with itself)
    """
    return Maxima.of(max_cosine(W_dec)).mean


def chance(
    W_dec: Float[Tensor, "latent d_model"], targets: Float[Tensor, "target d_model"] | None = None, *, seed: int = 0
) -> Chance:
    """Largest cosines of random rows: with `targets`, or (None) with each other, as many as `W_dec` has."""
    rows, found = unit_rows(W_dec), []
    for covariance in (False, True):
        random = random_rows(rows, len(rows) if targets is None else NULL_ROWS, covariance=covariance, seed=seed)
        asked, others = random[:NULL_ROWS], random if targets is None else unit_rows(targets)
        largest = rows.new_empty(len(asked))
        for at in blocks(len(asked), MAX_BLOCK_ELEMENTS // max(len(others), 1)):
            cosines = asked[at] @ others.T
            if targets is None:
                cosines.diagonal(at.start).fill_(-torch.inf)  # a row is not another row
            largest[at] = cosines.amax(1)
        found.append(Maxima.of(largest))
    return Chance(*found)


class _Nearest:
    """The largest cosine of each latent with another so far, and whose it is."""

    def __init__(self, rows: Tensor):
        self.cosine = rows.new_full((len(rows),), -torch.inf)
        self.latent = torch.full_like(self.cosine, -1, dtype=torch.int64)

    def update(self, cosines: Float[Tensor, "here there"], here: slice, there: slice) -> None:
        if here == there:
            cosines = cosines.clone().fill_diagonal_(-torch.inf)  # a latent is not another latent
        else:
            self._raise(there, cosines.T, here.start)
        self._raise(here, cosines, there.start)

    def _raise(self, at: slice, cosines: Float[Tensor, "latent other"], first: int) -> None:
        largest = cosines.amax(1)
        better = (largest > self.cosine[at]).nonzero()[:, 0]  # ever fewer: only they pay for an argmax
        self.cosine[at.start + better] = largest[better]
        self.latent[at.start + better] = cosines[better].argmax(1) + first


class _Published:
    """The largest cosine of each latent j with the latents i that the published code compares it with, floored at 0.

    Below PUBLISHED_WHOLE_BELOW latents these are the i < j. Above, for j in a chunk of latents that starts at c, they
    are the i < j - c and those after the chunk: the mask of one chunk is laid over the rows of the first (D16).
    """

    def __init__(self, rows: Tensor):
        n = len(rows)
        self.largest = rows.new_zeros(n)
        j = torch.arange(n, device=rows.device)
        chunk = n if n < PUBLISHED_WHOLE_BELOW else PUBLISHED_CHUNK
        self.below, self.from_ = j % max(chunk, 1), (j // max(chunk, 1) + 1) * chunk

    def update(self, cosines: Float[Tensor, "here there"], here: slice, there: slice) -> None:
        self._raise(there, cosines, here)
        if here != there:
            self._raise(here, cosines.T, there)

    def _raise(self, at: slice, cosines: Float[Tensor, "other latent"], others: slice) -> None:
        below, from_ = self.below[at], self.from_[at]
        if others.start >= below.max() and others.stop <= from_.min():
            return
        if others.stop > below.min() and others.start < from_.max():
            i = torch.arange(others.start, others.stop, device=below.device)[:, None]
            cosines = cosines.where((i < below) | (i >= from_), 0.0)
        self.largest[at] = self.largest[at].maximum(cosines.amax(0))

    def mean(self) -> float:
        return self.largest.double().mean().item() if len(self.largest) > 1 else math.nan


class _Depth:
    """Pairs of used latents by difference of depth and cosine."""

    def __init__(self, rows: Tensor, centre_of_mass: Tensor, max_gap: float):
        if len(centre_of_mass) != len(rows):
            raise ConfigError(
                "centre_of_mass", f"{len(centre_of_mass)} given for {len(rows)} latents; give one for each"
            )
        if not (math.isfinite(max_gap) and max_gap > 0):
            raise ConfigError("max_gap", f"{max_gap} given; it must be a positive number of layers")
        self.rows, self.centre, self.max_gap = rows, centre_of_mass.to(rows), max_gap
        self.counts = torch.zeros((GAP_BINS + 1) * (COSINE_BINS + 1), dtype=torch.int64)
        self.sums = torch.zeros(GAP_BINS + 1, dtype=torch.float64)

    def update(self, cosines: Float[Tensor, "here there"], here: slice, there: slice) -> None:
        gaps = (self.centre[here, None] - self.centre[None, there]).abs_()
        cosines, gaps = _once(cosines, here, there), _once(gaps, here, there)
        gap = _bin(gaps, 0.0, self.max_gap, GAP_BINS)
        cosine = _bin(cosines, -COSINE_LIMIT, COSINE_LIMIT, COSINE_BINS)
        self.counts += _count(gap * (COSINE_BINS + 1) + cosine, len(self.counts))
        self.sums += gap.flatten().bincount(cosines.flatten().double(), GAP_BINS + 1).cpu()

    def result(self) -> DepthGaps:
        counts = self.counts.view(GAP_BINS + 1, COSINE_BINS + 1)
        n_pairs = counts.sum(1)[:GAP_BINS]
        used = ~self.centre.isnan()
        n_used = int(used.sum())
        mean, std = _permuted(self.rows[used], self.centre[used], self.max_gap)
        return DepthGaps(
            histogram=counts[:GAP_BINS, :COSINE_BINS].clone(),
            max_gap=self.max_gap,
            n_pairs=n_pairs,
            mean=self.sums[:GAP_BINS] / n_pairs,
            n_beyond=n_used * (n_used - 1) // 2 - int(n_pairs.sum()),
            chance_mean=mean,
            chance_std=std,
        )


def _permuted(
    rows: Float[Tensor, "latent d_model"], centre: Float[Tensor, " latent"], max_gap: float
) -> tuple[float, Float[Tensor, " gap"]]:
    """Mean and standard deviation of the mean cosine of each gap when centres are permuted: exact, without a draw.

    Second moments of sum_{i != j} X_ij Y_ij under permutation of one of them (Mantel 1967), X the cosines about their
    mean and Y the pairs of a gap, need only each one's sum of squares and the sums of its rows.
    """
    n = len(rows)
    if n < 4:
        return math.nan, torch.full((GAP_BINS,), torch.nan, dtype=torch.float64)
    own = rows.square().sum(1).double()
    row_sums = (rows @ rows.sum(0)).double() - own
    mean = row_sums.sum() / (n * (n - 1))
    squares = (rows.T @ rows).double().square().sum() - own.square().sum() - n * (n - 1) * mean.square()
    rows_squared = (row_sums - (n - 1) * mean).square().sum()
    pairs = _gap_counts(centre.double().sort().values, max_gap)  # [gap, latent]
    total, degrees = pairs.sum(1), pairs.square().sum(1)
    one = 2 * squares * total / (n * (n - 1))
    two = 4 * (rows_squared - squares) * (degrees - total) / (n * (n - 1) * (n - 2))
    three = (2 * squares - 4 * rows_squared) * (total.square() + 2 * total - 4 * degrees)
    variance = one + two + three / (n * (n - 1) * (n - 2) * (n - 3))
    return mean.item(), (variance.clamp(min=0).sqrt() / total).cpu()


def _gap_counts(centre: Float[Tensor, " latent"], max_gap: float) -> Float[Tensor, "gap latent"]:
    """How many others lie at each gap from each latent, its centre among the sorted ones."""
    edges = torch.linspace(0, max_gap, GAP_BINS + 1, dtype=centre.dtype, device=centre.device)
    nearer = []
    for k, edge in enumerate(edges):
        closed = k == GAP_BINS  # the last gap holds its right edge
        above = torch.searchsorted(centre, centre + edge, right=closed)
        below = torch.searchsorted(centre, centre - edge, right=not closed)
        nearer.append((above - below - 1).clamp(min=0))  # without itself
    return torch.stack(nearer).diff(dim=0).double()


# ---- shared ----------------------------------------------------------------------------------------------------------


def unit_rows(rows: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
    """Rows of length 1, in float32 or better; a zero row stays one."""
    if not rows.isfinite().all():
        raise NumericsError("directions", "hold NaN or infinity; every row must be finite")
    return torch.nn.functional.normalize(rows.detach().to(torch.promote_types(rows.dtype, torch.float32)), dim=-1)


def random_rows(rows: Tensor, n: int, *, covariance: bool, seed: int) -> Float[Tensor, "row d_model"]:
    """n random unit rows, uniform or with the mean and covariance of the unit rows `rows`."""
    draw = torch.randn(n, rows.shape[1], generator=torch.Generator().manual_seed(seed), dtype=rows.dtype)
    draw = draw.to(rows.device)
    if covariance:
        mean = rows.mean(0)
        variance, axes = torch.linalg.eigh((rows - mean).T.cov(correction=0).double())
        draw = draw @ (axes * variance.clamp(min=0).sqrt()).T.to(rows) + mean
    return unit_rows(draw)


def _block_pairs(n: int, block: int) -> Iterator[tuple[int, tuple[slice, slice]]]:
    """Every unordered pair of blocks of n latents once, and how many of the n^2 ordered pairs it settles.

    For each block the others come in rising order.
    """
    for i in range(0, n, block):
        for j in range(i, n, block):
            here, there = slice(i, min(i + block, n)), slice(j, min(j + block, n))
            yield (here.stop - i) * (there.stop - j) * (1 if i == j else 2), (here, there)


def blocks(n: int, at_once: int, desc: str = "", *, progress: bool = False) -> Iterator[slice]:
    """Blocks of n rows."""
    starts = range(0, n, max(at_once, 1))
    parts = (slice(start, min(start + max(at_once, 1), n)) for start in starts)
    return bar(((at.stop - at.start, at) for at in parts), total=n, desc=desc, progress=progress, unit="latent")


def _once(block: Shaped[Tensor, "here there"], here: slice, there: slice) -> Shaped[Tensor, "..."]:
    """What a block of pairs holds of pairs not held by another: all, or what is above the diagonal it lies on."""
    return block[torch.ones_like(block, dtype=torch.bool).triu_(1)] if here == there else block


def _bin(x: Float[Tensor, "*pair"], low: float, high: float, n: int) -> Int[Tensor, "*pair"]:
    """The bin of n equal ones on [low, high], both edges included, that each x falls into; n for others and NaN."""
    bins = ((x - low) * (n / (high - low))).floor_().clamp_(max=n - 1)
    return torch.where((x >= low) & (x <= high), bins, n).int()


def _count(bins: Int[Tensor, "..."], n: int) -> Int[Tensor, " bin"]:
    return bins.flatten().bincount(minlength=n).cpu()
