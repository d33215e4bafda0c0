"""How long the vectors are that a run learns from: those left out for it are counted, the longest is set beside the median."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mlsae.mesh import Mesh
from mlsae.reading import Reading


class Norms:
    """Of each layer. Every process sees its own vectors; `add_up`, once a step, makes one of what all of them saw."""

    def __init__(self, n_layers: int, mesh: Mesh):
        self.mesh = mesh
        self.left_out: Int[Tensor, " layer"] = torch.zeros(n_layers, dtype=torch.int64)
        """Vectors beyond the norm limit, in the whole run."""
        self.largest: Float[Tensor, " layer"] = torch.zeros(n_layers)
        """Since `ratio` was last asked, of those beyond the limit too."""
        self._seen: list[Float[Tensor, "two layer"]] = []
        """Both, of each micro-batch that is not added up yet."""
        self._last: Float[Tensor, "layer token"] = torch.zeros(n_layers, 0)
        """Of what the SAE saw in the last one."""

    def see(self, reading: Reading) -> None:
        """Look at a micro-batch."""
        norms = reading.norms.flatten(1)
        largest = norms.amax(1) if norms.numel() else norms.new_zeros(len(norms))
        largest = largest.clamp(max=torch.finfo(norms.dtype).max)  # infinity is beyond the limit, and saved
        self._seen.append(torch.stack([reading.over_norm.double(), largest.double()]))
        self._last = reading.norms[:, reading.visible]

    def add_up(self) -> None:
        """Count what all processes saw since this was last done."""
        parts = self.mesh.gathered(torch.stack(self._seen).to(self.mesh.device), "dp")
        self._seen = []
        together = torch.cat(parts).cpu()
        self.left_out = self.left_out + together[:, 0].sum(0).long()
        self.largest = self.largest.maximum(together[:, 1].amax(0).float())

    def ratio(self) -> float:
        """The largest norm over the median of what the SAE saw of the last micro-batch, of the layer where that is most."""
        seen = torch.cat(self.mesh.tokens_by_rank(self._last.cpu()), 1)
        largest, self.largest = self.largest, torch.zeros_like(self.largest)
        median = seen.median(1).values if seen.numel() else torch.full_like(largest, torch.inf)
        return float((largest / median).max())

    def forget(self) -> None:
        """Drop what is not added up yet."""
        self._seen = []
