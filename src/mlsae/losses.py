"""What training minimises: reconstruction and AuxK, each in the standard form and in the published code's (`lawson2024`).

Both take one micro-batch `[layer, token, d_model]` and are means over layers. Sources: Gao et al. 2024 (normalised error, AuxK);
Lawson et al. 2024 and its code for the second forms.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mlsae import ops
from mlsae.sae import MLSAE, Code

Resid = Float[Tensor, "layer token d_model"]


def squared_error(resid: Resid, recon: Resid) -> Float[Tensor, " layer"]:
    """`sum |resid - recon|^2` over tokens and features, in raw units."""
    return (resid - recon).square().sum((1, 2))


def per_dimension(resid: Resid, recon: Resid, variance: Float[Tensor, " layer"]) -> Float[Tensor, " layer"]:
    """`SSE_l / (N d v_l)`: error as a fraction of the layer's variance about its per-feature mean, fixed before training.

    0 is perfect, 1 is predicting the mean of the initial sample. The denominator does not depend on the batch, so gradients do
    not depend on how a step is split. (Gao et al. 2024.)
    """
    return squared_error(resid, recon) / (resid.shape[1] * resid.shape[2] * variance)


def all_scalars(resid: Resid, recon: Resid, variance: Float[Tensor, " layer"]) -> Float[Tensor, " layer"]:
    """`MSE_l / var(all scalars of layer l in this micro-batch)`, the published code's; ignores `variance`."""
    mse = squared_error(resid, recon) / (resid.shape[1] * resid.shape[2])
    return mse / resid.flatten(1).var(1)


RECONSTRUCTION: dict[str, Callable[[Resid, Resid, Float[Tensor, " layer"]], Float[Tensor, " layer"]]] = {
    "per_dimension": per_dimension,
    "all_scalars": all_scalars,
}


def aux_residual(
    sae: MLSAE, resid: Resid, code: Code, recon: Resid, dead: Bool[Tensor, " n_latents"], k_aux: int
) -> Float[Tensor, ""]:
    """Mean over layers of `sum |e - e_hat|^2 / sum |e - mean_token(e)|^2`: how well dead latents predict the error.

    `e = stop_grad(resid - recon)` and `e_hat` is the scaled sum of the `k_aux` most active dead latents, without shift or bias.
    Exactly 0, without gradient, when nothing is dead. (Gao et al. 2024, in the loss's own space.)
    """
    if k_aux == 0 or not dead.any():
        return resid.new_zeros(())
    error = (resid - recon).detach()
    x = sae.frame.apply_to(resid, code.shift, code.scale)
    guess = torch.cat([_dead_part(sae, x, dead, k_aux, *part) for part in sae.parts(code.rows)]) * code.scale
    spread = (error - error.mean(1, keepdim=True)).square().sum((1, 2))
    # A single token has no spread, and a group without dead latents no guess: neither has anything to learn here.
    guessing = torch.cat(
        [dead[latents].any().expand(here.stop - here.start) for here, _, latents in sae.parts(code.rows)]
    )
    spread = spread.where((spread > 0) & guessing, torch.inf)
    return ((error - guess).square().sum((1, 2)) / spread).mean()


def _dead_part(
    sae: MLSAE, x: Tensor, dead: Tensor, k_aux: int, here: slice, group: int, latents: slice
) -> Float[Tensor, "layer token d_model"]:
    """The framed reconstruction by one group's dead latents, on their compacted rows of the weights."""
    ids = dead[latents].nonzero().flatten() + latents.start
    if len(ids) == 0:
        return torch.zeros_like(x[here])
    rows = (x[here] - sae.biases[group]).flatten(0, 1)
    values, indices = ops.encode_topk(rows, sae.W_enc[ids], min(k_aux, len(ids)))
    return ops.sparse_decode(values, indices, sae.W_dec[ids]).view_as(x[here])


def aux_framed(
    sae: MLSAE, resid: Resid, code: Code, recon: Resid, dead: Bool[Tensor, " n_latents"], k_aux: int
) -> Float[Tensor, ""]:
    """The published code's AuxK (defect D3): the target is raw and not detached, the reconstruction framed and with `b_pre`.

    One ratio over all layers, whose denominator subtracts each token's mean over features. It is not zero when nothing is dead.
    NaN becomes 0.
    """
    if k_aux == 0:
        return resid.new_zeros(())
    error = resid - recon
    x = sae.frame.apply_to(resid, code.shift, code.scale)
    guess = [
        _dead_part(sae, x, dead, k_aux, here, group, latents) + sae.biases[group]
        for here, group, latents in sae.parts(code.rows)
    ]
    spread = (error - error.mean(2, keepdim=True)).square().mean()
    return ((error - torch.cat(guess)).square().mean() / spread).nan_to_num(0.0)


AUX: dict[str, Callable[[MLSAE, Resid, Code, Resid, Tensor, int], Float[Tensor, ""]]] = {
    "residual": aux_residual,
    "framed": aux_framed,
}
