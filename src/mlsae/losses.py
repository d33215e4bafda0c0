"""What training minimises: reconstruction and AuxK, each in the standard form and in the published code's (`lawson2024`).

Both take one micro-batch `[layer, token, d_model]` and are means over layers. Where several processes each have a part of it, a
mesh adds them up: every process gets the loss of the whole, and the derivatives of its own part.

Sources: Gao et al. 2024 (normalised error, AuxK);
Lawson et al. 2024 and its code for the second forms.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mlsae import ops
from mlsae.config import Impl
from mlsae.mesh import ALONE, Mesh
from mlsae.parallel import ShardedSAE
from mlsae.sae import MLSAE, Code, Part, joined

Resid = Float[Tensor, "layer token d_model"]
PerLayer = Float[Tensor, " layer"]


def per_dimension(
    resid: Resid, squared_error: PerLayer, variance: PerLayer, n_tokens: int | None = None, mesh: Mesh = ALONE
) -> PerLayer:
    """`SSE_l / (N d v_l)`: error as a fraction of the layer's variance about its per-feature mean, fixed before training.

    0 is perfect, 1 is predicting the mean of the initial sample. The denominator does not depend on the batch, so gradients do
    not depend on how a step is split. (Gao et al. 2024.) `squared_error` is that of all `n_tokens` (None: those of resid).
    """
    return squared_error / (_tokens(resid, n_tokens) * resid.shape[2] * variance)


def all_scalars(
    resid: Resid, squared_error: PerLayer, variance: PerLayer, n_tokens: int | None = None, mesh: Mesh = ALONE
) -> PerLayer:
    """`MSE_l / var(all scalars of layer l in this micro-batch)`, the published code's; ignores `variance`."""
    n_tokens = _tokens(resid, n_tokens)
    return squared_error / (n_tokens * resid.shape[2]) / mesh.scalar_variance(resid, n_tokens)


def _tokens(resid: Resid, n_tokens: int | None) -> int:
    return resid.shape[1] if n_tokens is None else n_tokens


RECONSTRUCTION: dict[str, Callable[[Resid, PerLayer, PerLayer, int | None, Mesh], PerLayer]] = {
    "per_dimension": per_dimension,
    "all_scalars": all_scalars,
}


def aux_residual(
    sae: MLSAE,
    resid: Resid,
    code: Code,
    error: Resid,
    dead: Bool[Tensor, " n_latents"],
    k_aux: int,
    impl: Impl = "auto",
    n_tokens: int | None = None,
    mesh: Mesh = ALONE,
) -> Float[Tensor, ""]:
    """Mean over layers of `sum |e - e_hat|^2 / sum |e - mean_token(e)|^2`: how well dead latents predict the error.

    `e = stop_grad(resid - recon)` and `e_hat` is the scaled sum of the `k_aux` most active dead latents, without shift or bias.
    Exactly 0, without gradient, when nothing is dead. (Gao et al. 2024, in the loss's own space.)
    """
    if k_aux == 0 or not dead.any():
        return resid.new_zeros(())
    error = error.detach()
    mean = mesh.token_mean(error, _tokens(resid, n_tokens))
    spread = (error - mean).square().sum((1, 2))
    if isinstance(sae, ShardedSAE):
        left = _left_sharded(sae, resid, code, error, dead, k_aux, impl)
    else:
        left = joined([_left(sae, resid, code, error, dead, k_aux, part, impl) for part in sae.parts(code.rows)])
    left, spread = mesh.total(torch.stack([left, spread.to(left)]))
    return (left / spread.where(spread > 0, torch.inf)).mean()  # a single token has no spread


def _left_sharded(
    sae: ShardedSAE, resid: Resid, code: Code, error: Resid, dead: Tensor, k_aux: int, impl: Impl
) -> PerLayer:
    """`_left` of every part, where the dead latents are shared out among processes."""
    guess = sae.decode_dead(resid, code, dead, k_aux, impl) * code.scale
    left = (error - guess).square().sum((1, 2))
    some = [dead[part.latents].any().expand(part.n_layers) for part in sae.parts(code.rows)]
    return left.where(torch.cat(some), 0.0)


def _left(
    sae: MLSAE, resid: Resid, code: Code, error: Resid, dead: Tensor, k_aux: int, part: Part, impl: Impl
) -> Float[Tensor, " part"]:
    """The squared error that one group's dead latents leave; 0 where there is none to explain any."""
    ids = dead[part.latents].nonzero().flatten() + part.latents.start
    if len(ids) == 0:
        return error.new_zeros(part.n_layers)
    values, indices = _encode_dead(sae, resid, code, ids, k_aux, part, impl)
    W_dec, scale = sae.W_dec[ids], part.of(code.scale)
    _, left = ops.decode_error(values, indices, W_dec, None, error[part.here], None, scale, impl)
    return left


def _encode_dead(
    sae: MLSAE, resid: Resid, code: Code, ids: Int[Tensor, " dead"], k_aux: int, part: Part, impl: Impl
) -> tuple[Float[Tensor, "part token top"], Int[Tensor, "part token top"]]:
    """The most active of a group's dead latents, as positions in `ids`."""
    return sae.encode_part(resid, code.shift, code.scale, part, sae.W_enc[ids], min(k_aux, len(ids)), impl)


def aux_framed(
    sae: MLSAE,
    resid: Resid,
    code: Code,
    error: Resid,
    dead: Bool[Tensor, " n_latents"],
    k_aux: int,
    impl: Impl = "auto",
    n_tokens: int | None = None,
    mesh: Mesh = ALONE,
) -> Float[Tensor, ""]:
    """The published code's AuxK (defect D3): the target is raw and not detached, the reconstruction framed and with `b_pre`.

    One ratio over all layers, whose denominator subtracts each token's mean over features. It is not zero when nothing is dead.
    NaN becomes 0.
    """
    if k_aux == 0:
        return resid.new_zeros(())
    if isinstance(sae, ShardedSAE):
        bias = sae.layer_biases(code).expand_as(resid)
        guess = sae.decode_dead(resid, code, dead, k_aux, impl) + bias if dead.any() else bias
    else:
        guess = joined([_guess(sae, resid, code, dead, k_aux, part, impl) for part in sae.parts(code.rows)])
    spread = error - error.mean(2, keepdim=True)
    return mesh.ratio(error - guess, spread).nan_to_num(0.0)


def _guess(
    sae: MLSAE, resid: Resid, code: Code, dead: Tensor, k_aux: int, part: Part, impl: Impl
) -> Float[Tensor, "part token d_model"]:
    """The framed reconstruction, with bias, by one group's dead latents."""
    ids = dead[part.latents].nonzero().flatten() + part.latents.start
    bias = sae.biases[part.group]
    if len(ids) == 0:
        return bias.expand_as(resid[part.here])
    values, indices = _encode_dead(sae, resid, code, ids, k_aux, part, impl)
    decoded = ops.decode(values.flatten(0, 1), indices.flatten(0, 1), sae.W_dec[ids], impl)
    return decoded.view_as(resid[part.here]) + bias


AUX: dict[str, Callable[[MLSAE, Resid, Code, Resid, Tensor, int, Impl, int | None, Mesh], Float[Tensor, ""]]] = {
    "residual": aux_residual,
    "framed": aux_framed,
}
