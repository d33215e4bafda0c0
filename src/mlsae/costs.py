"""What training costs: parameters, bytes, operations and traffic, one small formula each. docs/scale.md says what they come to.

`n` is n_latents, `d` d_model, `L` the layers read, `T` the tokens of a micro-batch that a rank reads, `s` the share of the
latents that it holds (1 / tp). Weights and what is summed are float32 in every precision. Nothing here imports torch.
"""

import math

TRAINING_BYTES = 32
"""Bytes of training state for each entry of one weight matrix: two matrices, each with gradient and two moments, in float32."""
CHECKPOINT_BYTES = 24
"""Bytes on disk for the same: two matrices, each with two moments."""
LENS_BYTES = 4
"""Bytes of each entry of a tuned lens, which is not trained: in memory, and in every checkpoint."""
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
GENERATOR_BYTES = 5056
"""State of torch's random-number generator."""
RESID_COPIES = {"cpu": 4, "cuda": 6}
"""Copies of a micro-batch's vectors that live at once: as read, those left by the mask, in the frame, and their error; on a GPU
the first two of the next micro-batch as well, which is read meanwhile."""
PAIR_BYTES = {"cpu": 48, "cuda": 80}
"""Bytes for every active latent of a vector: its value and number, what the backward pass makes of them, and on a GPU their sort.
The first is measured (docs/scale.md), the second counted."""
AUX_PAIR_BYTES = 24
"""The same for those of AuxK, the most of which is not there when the others' most is."""

# ---- what is learned, and its memory --------------------------------------------------------------------------------


def parameters(n_latents: int, groups: int, d_model: int) -> int:
    """`(2 n + groups) d`: encoder and decoder rows, and a bias for each dictionary."""
    return (2 * n_latents + groups) * d_model


def state_bytes(n_latents: int, d_model: int, share: float = 1.0) -> int:
    """`32 s n d`: both weight matrices, their gradients and Adam's two moments, all float32."""
    return int(TRAINING_BYTES * n_latents * d_model * share)


def lens_bytes(n_layers: int, d_model: int) -> int:
    """`4 L d (d + 1)`: a matrix and a bias for each layer."""
    return LENS_BYTES * n_layers * d_model * (d_model + 1)


def clock_bytes(n_latents: int) -> int:
    """`16 n`: how long every latent has been quiet, in int64, now and before the step; whole on every rank."""
    return 16 * n_latents


def buffer_bytes(n_latents: int, d_model: int, share: float, precision: str) -> int:
    """`4 s n d`, and half as much again in 16 bits: a gradient on its way to the sum, and the encoder rounded for the product."""
    rounded = 0 if precision == "float32" else DTYPE_BYTES[precision]
    return int((4 + rounded) * n_latents * d_model * share)


def lm_bytes(n_parameters: int, dtype: str) -> int:
    """The language model's weights, whole on every rank unless a device map spreads them out."""
    return n_parameters * DTYPE_BYTES[dtype]


def lm_working_bytes(n_tokens: int, d_model: int, d_ff: int, dtype: str) -> int:
    """`T (6 d + 3 d_ff)` numbers: what one block holds while it runs, its queries, keys, values, stream and gated MLP; there
    are no logits, and attention that is computed in tiles adds little (Dao et al. 2022)."""
    return n_tokens * (6 * d_model + 3 * d_ff) * DTYPE_BYTES[dtype]


def resid_bytes(n_layers: int, n_tokens: int, d_model: int, kind: str) -> int:
    """`4 c L T d`, c the copies that live at once (RESID_COPIES)."""
    return 4 * RESID_COPIES[kind] * n_layers * n_tokens * d_model


def code_bytes(n_layers: int, n_tokens: int, k: int, tp: int, kind: str) -> int:
    """`L T k` pairs of PAIR_BYTES, and over tp ranks 32 bytes more for each of the tp k candidates, which are sorted."""
    per_pair = PAIR_BYTES[kind] + (0 if tp == 1 else 8 + 32 * tp)
    return n_layers * n_tokens * k * per_pair


def aux_bytes(n_latents: int, d_model: int, share: float, n_layers: int, n_tokens: int, k_aux: int, tp: int) -> int:
    """`8 s n d + 8 L T d + 24 L T k_aux`, and what tp adds: AuxK's worst case, rows of dead latents and their gradients, two
    more copies of the vectors, and codes. Measured to be the same with half of all latents dead and with nearly all."""
    if k_aux == 0:
        return 0
    per_pair = AUX_PAIR_BYTES + (0 if tp == 1 else 4 + 16 * tp)
    vectors = n_layers * n_tokens
    return int(8 * n_latents * d_model * share) + vectors * (8 * d_model + per_pair * k_aux)


def checkpoint_bytes(n_latents: int, d_model: int, groups: int, n_layers: int, *, frame: bool, lens: bool) -> int:
    """`24 n d + 8 n` and little else: weights and moments, and how long each latent was quiet."""
    by_latent = CHECKPOINT_BYTES * n_latents * d_model + 8 * n_latents
    by_layer = 4 * n_layers * ((d_model + 1 if frame else 0) + 5)
    rest = 12 * groups * d_model + GENERATOR_BYTES
    return by_latent + by_layer + rest + (lens_bytes(n_layers, d_model) if lens else 0)


def sae_bytes(n_latents: int, d_model: int, groups: int) -> int:
    """`4 (2 n + groups) d`: the SAE that `from_pretrained` reads."""
    return 4 * parameters(n_latents, groups, d_model)


def token_bytes(n_tokens: int, d_vocab: int) -> int:
    """The packed text in the cache: 2 bytes a token, or 4 where the vocabulary needs them. Read as it is needed, never whole."""
    return n_tokens * (2 if d_vocab <= 2**16 else 4)


# ---- operations, a multiply-add counting two -------------------------------------------------------------------------


def encoder_flops(n_latents: int, groups: int, n_layers: int, d_model: int) -> int:
    """`2 L n d / groups`: the dense product, in which each vector meets one dictionary. The floor of a plain step."""
    return n_layers * d_model * (2 * n_latents // groups)


def sparse_flops(k: int, n_layers: int, d_model: int) -> int:
    """`10 L k d`: five products with the rows of the active latents: decode, the gradients of values, decoder, encoder, bias."""
    return 10 * n_layers * k * d_model


def flops_per_token(n_latents: int, groups: int, k: int, n_layers: int, d_model: int) -> int:
    """Of training on a token: `encoder_flops + sparse_flops`.

    Left out: the language model, AuxK, which works only while latents are dead, and the optimizer, which works once a step.
    """
    return encoder_flops(n_latents, groups, n_layers, d_model) + sparse_flops(k, n_layers, d_model)


def aux_flops(n_dead: int, groups: int, k_aux: int, n_layers: int, d_model: int) -> int:
    """The same of the dead latents, k_aux of which are active."""
    return flops_per_token(n_dead, groups, min(k_aux, n_dead), n_layers, d_model) if n_dead and k_aux else 0


def lm_flops(n_block_parameters: int, n_layers: int, d_attention: int, context_length: int) -> int:
    """`2 N + 2 L c d`: forward through the blocks' N weights, and causal attention, which sees c / 2 positions on average
    (Kaplan et al. 2020, table 1, without embeddings and unembedding, which are not computed)."""
    return 2 * n_block_parameters + 2 * n_layers * context_length * d_attention


# ---- memory traffic: what cannot be avoided ----------------------------------------------------------------------------


def micro_batch_traffic(
    n_latents: int, d_model: int, share: float, n_layers: int, n_tokens: int, lm_weights: int
) -> int:
    """Bytes through a rank's memory: the language model's weights once, each SAE matrix read forward and the encoder again
    backward (12), both gradients added to (16), and every vector written and read once."""
    return lm_weights + int(28 * n_latents * d_model * share) + 8 * n_layers * n_tokens * d_model


def update_traffic(n_latents: int, d_model: int, share: float) -> int:
    """`56 s n d`: Adam reads and writes weights and both moments, and reads the gradient, of two matrices."""
    return int(56 * n_latents * d_model * share)


# ---- network: what a rank hands to its collectives (payload), and sends in a ring (wire) ---------------------------------


def code_payload(n_layers: int, n_tokens: int, k: int) -> int:
    """`8 L T k`: a value and a latent, 4 bytes each, of every candidate; one all-gather over tp for each micro-batch."""
    return 8 * n_layers * n_tokens * k


def sums_payload(n_layers: int, n_tokens: int, d_model: int) -> int:
    """`4 L T d`: this rank's part of every reconstruction; one all-reduce over tp for each micro-batch."""
    return 4 * n_layers * n_tokens * d_model


def aux_payload(n_layers: int, n_tokens: int, k_aux: int, d_model: int) -> tuple[int, int]:
    """`4 L T k_aux` gathered and `4 L T d` reduced: the two collectives over tp that AuxK adds while a latent is dead."""
    return 4 * n_layers * n_tokens * k_aux, sums_payload(n_layers, n_tokens, d_model)


def gradient_payload(n_latents: int, d_model: int, share: float) -> int:
    """`8 s n d`: both matrices' gradients; two all-reduces over dp for each step."""
    return int(8 * n_latents * d_model * share)


def clock_payload(n_latents: int, n_layers: int) -> int:
    """`4 (n + 1 + L)`: which latents were active on any dp rank, on how many tokens, and each layer's squared error.

    Two all-reduces for each micro-batch.
    """
    return 4 * (n_latents + 1 + n_layers)


def reduced_wire(payload: int, ranks: int) -> int:
    """`2 (r - 1) / r` payloads: a ring all-reduce (Patarasuk and Yuan 2009), what each rank sends and receives."""
    return math.ceil(2 * (ranks - 1) / ranks * payload)


def gathered_wire(payload: int, ranks: int) -> int:
    """`r - 1` payloads: a ring all-gather."""
    return (ranks - 1) * payload
