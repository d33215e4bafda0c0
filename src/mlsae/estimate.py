"""What one run takes in one layout: memory, operations, traffic, and the most tokens a second that each allows.

costs.py has the formulas.
"""

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from pydantic import Field

from mlsae import costs
from mlsae.config import Config, Layers, LMShape, Positive, latents_in
from mlsae.gpus import Gpu
from mlsae.recipes import PrecisionName

USABLE = 0.95
"""Of a GPU's memory: the rest is CUDA's own, and what fragments."""
MAX_TP = 1024
Above = Annotated[float, Field(gt=0)]


class PlanConfig(Config):
    """The run to plan; what is None is as `train` would have it."""

    lm: str | None = None
    """Language model: a Hugging Face id or a folder, of which only the config is read; None: the shape given instead."""
    d_model: Positive | None = None
    """Without lm: width of its residual stream."""
    n_layers: Positive | None = None
    """Without lm: its layers."""
    d_vocab: Positive | None = None
    """Without lm: its vocabulary."""
    n_lm_parameters: Positive | None = None
    """Without lm: its parameters, embeddings included."""
    tied_embeddings: bool = False
    """Without lm: its embedding and unembedding are one matrix."""
    expansion_factor: Annotated[float, Field(gt=0)] | None = None
    """Latents of one dictionary as a multiple of d_model; None: 16."""
    n_latents: Positive | None = None
    """Latents in all, instead of expansion_factor."""
    k: Positive = 32
    """Active latents of each residual vector."""
    layers: Layers | None = None
    """Layers the SAE reads, 0-based; None: every layer."""
    groups: Positive = 1
    """Dictionaries: 1 is shared by all layers."""
    tokens: Positive = 100_000_000
    """Tokens to train on."""
    context_length: Positive | None = None
    """Tokens in a sequence."""
    batch_size: Positive | None = None
    """Sequences in one forward pass, of all dp ranks together."""
    accumulation_steps: Positive | None = None
    """Forward passes in one optimizer step."""
    k_aux: Annotated[int, Field(ge=0)] | None = None
    """Dead latents that AuxK revives per vector; 0: off."""
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    """Checkpoints to keep."""
    precision: PrecisionName | None = None
    """Precision of the SAE's products; None: bfloat16 on a GPU, float32 on a CPU."""
    lm_dtype: PrecisionName | None = None
    """Precision of the language model; None: likewise."""
    gpu: Literal["h100", "h200", "a100-80gb", "a100-40gb", "l40s", "rtx-4090", "cpu"] = "h100"
    """Device of a rank: by data sheet, or this CPU, measured."""
    gpus: Positive | None = None
    """Ranks; None: dp times tp, or 1."""
    dp: Positive | None = None
    """Ranks that share out the tokens; None: as many as tp leaves."""
    tp: Positive | None = None
    """Ranks that share out the latents; None: the fewest that fit."""
    gpus_per_node: Positive = 8
    """Ranks of one machine."""
    gpu_memory: Above | None = None
    """GB of a device, instead of the data sheet's."""
    gpu_flops: Above | None = None
    """TFLOP/s of its dense products in `precision`, likewise."""
    gpu_bandwidth: Above | None = None
    """GB/s of its memory, likewise."""
    link_bandwidth: Above | None = None
    """GB/s in one direction between devices of a machine, likewise."""
    network_bandwidth: Above = 50.0
    """GB/s of each device between machines: 50 is 400 Gb/s."""
    efficiency: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the bound to expect; None: 0.7 on a CPU, where it was measured, and 0.4 on a GPU, where it was not."""


@dataclass(frozen=True)
class LMSize:
    """What a language model's config says of its size."""

    shape: LMShape
    d_vocab: int
    d_ff: int
    d_attention: int
    n_parameters: int
    n_block_parameters: int
    """Those of its blocks that compute on one token: of a mixture of experts, those that are chosen."""


@dataclass(frozen=True)
class Run:
    """One run in numbers."""

    lm: LMSize
    n_latents: int
    groups: int
    k: int
    k_aux: int
    n_layers: int
    deepest: int
    """Blocks that are computed: those up to the last layer read."""
    context_length: int
    batch_size: int
    accumulation_steps: int
    tokens: int
    keep_checkpoints: int
    precision: str
    lm_dtype: str
    dp: int
    tp: int
    gpu: Gpu
    per_node: int
    """Ranks of one machine."""
    network: float
    """Bytes a second of each rank between machines."""

    @property
    def share(self) -> float:
        """Of all latents, those of one rank."""
        return 1 / self.tp

    @property
    def rank_tokens(self) -> int:
        """Tokens of a micro-batch that the busiest rank reads."""
        return -(-self.batch_size // self.dp) * self.context_length

    @property
    def step_tokens(self) -> int:
        """Tokens of an optimizer step, of all ranks."""
        return self.batch_size * self.context_length * self.accumulation_steps


# ---- what it takes -----------------------------------------------------------------------------------------------------


def memory_of(run: Run) -> dict[str, int]:
    """Bytes of the busiest rank."""
    d_model, kind = run.lm.shape.d_model, run.gpu.kind
    of_latents = (run.n_latents, d_model, run.share)
    vectors = (run.n_layers, run.rank_tokens)
    weights = costs.state_bytes(*of_latents) // 4
    return {
        "SAE weights": weights,
        "gradients": weights,
        "Adam's moments": 2 * weights,
        "gradient buffers": costs.buffer_bytes(*of_latents, run.precision),
        "dead-latent clock": costs.clock_bytes(run.n_latents),
        "language model": costs.lm_bytes(run.lm.n_parameters, run.lm_dtype),
        "one block at work": costs.lm_working_bytes(run.rank_tokens, d_model, run.lm.d_ff, run.lm_dtype),
        "residual vectors": costs.resid_bytes(*vectors, d_model, kind),
        "codes": costs.code_bytes(*vectors, run.k, run.tp, kind),
        "AuxK at worst": costs.aux_bytes(*of_latents, *vectors, run.k_aux, run.tp),
    }


def capacity(gpu: Gpu) -> int:
    """Bytes that a run may fill."""
    return gpu.memory if gpu.kind == "cpu" else int(USABLE * gpu.memory)


def fits(run: Run) -> bool:
    """Whether a rank's memory holds it."""
    return sum(memory_of(run).values()) <= capacity(run.gpu)


def flops_of(run: Run) -> dict[str, int]:
    """Operations on one token, in all."""
    d_model = run.lm.shape.d_model
    blocks = run.lm.n_block_parameters * run.deepest // run.lm.shape.n_layers
    return {
        "language model": costs.lm_flops(blocks, run.deepest, run.lm.d_attention, run.context_length),
        "encoder": costs.encoder_flops(run.n_latents, run.groups, run.n_layers, d_model),
        "sparse products": costs.sparse_flops(run.k, run.n_layers, d_model),
        "AuxK at worst": costs.aux_flops(run.n_latents, run.groups, run.k_aux, run.n_layers, d_model),
    }


def traffic_of(run: Run) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of one rank's step, by axis: what it hands to collectives, and what it sends for them in a ring."""
    d_model, vectors = run.lm.shape.d_model, (run.n_layers, run.rank_tokens)
    payload, wire = {"tp": 0, "dp": 0}, {"tp": 0, "dp": 0}
    if run.tp > 1:
        code, sums = costs.code_payload(*vectors, run.k), costs.sums_payload(*vectors, d_model)
        sent = costs.gathered_wire(code, run.tp) + costs.reduced_wire(sums, run.tp)
        payload["tp"], wire["tp"] = (run.accumulation_steps * n for n in (code + sums, sent))
    if run.dp > 1:
        gradients = costs.gradient_payload(run.n_latents, d_model, run.share)
        payload["dp"] = gradients + run.accumulation_steps * costs.clock_payload(run.n_latents, run.n_layers)
        wire["dp"] = costs.reduced_wire(payload["dp"], run.dp)
    return payload, wire


def limits_of(run: Run, wire: dict[str, int]) -> dict[str, float]:
    """Tokens a second that each resource allows if all else were free and nothing waited: a bound, never reached."""
    flops, gpu, d_model = flops_of(run), run.gpu, run.lm.shape.d_model
    busiest = run.rank_tokens * run.accumulation_steps
    sae = flops["encoder"] + flops["sparse products"]
    seconds = {
        "compute": busiest
        * (flops["language model"] / gpu.flops(run.lm_dtype) + sae * run.share / gpu.flops(run.precision))
    }
    lm_weights = costs.lm_bytes(run.lm.n_block_parameters, run.lm_dtype)
    moved = run.accumulation_steps * costs.micro_batch_traffic(
        run.n_latents, d_model, run.share, run.n_layers, run.rank_tokens, lm_weights
    )
    seconds["memory bandwidth"] = (moved + costs.update_traffic(run.n_latents, d_model, run.share)) / gpu.bandwidth
    far = run.network
    if run.dp * run.tp > 1:
        over_tp = wire["tp"] / (gpu.link if run.tp <= run.per_node else min(far, gpu.link))
        over_dp = wire["dp"] / (gpu.link if run.dp * run.tp <= run.per_node else min(far, gpu.link))
        seconds["network"] = over_tp + over_dp
    return {name: run.step_tokens / time for name, time in seconds.items()}


# ---- what would fit ---------------------------------------------------------------------------------------------------


def smallest_tp(run: Run) -> int | None:
    """The fewest ranks that must share out the latents for all to fit; None: no number does."""
    return next((tp for tp in range(run.tp, MAX_TP + 1) if fits(replace(run, tp=tp))), None)


def largest_batch(run: Run) -> int:
    """The most sequences in a forward pass that fit in this layout, a multiple of dp; 0: none do."""
    found = (n for n in range(run.batch_size // run.dp, 0, -1) if fits(replace(run, batch_size=n * run.dp)))
    return next(found, 0) * run.dp


def largest_expansion(run: Run) -> int:
    """The largest whole expansion factor that fits in this layout; 0: none does."""
    d_model, low, high = run.lm.shape.d_model, 0, 1

    def holds(factor: int) -> bool:
        return fits(replace(run, n_latents=latents_in(d_model, float(factor)) * run.groups))

    while holds(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
