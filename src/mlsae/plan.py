"""What a training run will take, before anything starts: memory, traffic, a bound on its speed, and what would fit instead.

The formulas are in costs.py, the devices in gpus.py, and estimate.py puts them together for one layout.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from mlsae import costs, gpus
from mlsae.config import LMShape, TrainConfig
from mlsae.errors import ConfigError
from mlsae.estimate import (
    LMSize,
    PlanConfig,
    Run,
    capacity,
    fits,
    flops_of,
    largest_batch,
    largest_expansion,
    limits_of,
    memory_of,
    smallest_tp,
    traffic_of,
)
from mlsae.gpus import GB, Gpu
from mlsae.recipes import PrecisionName
from mlsae.resolving import resolve

FRACTIONS = {
    "cpu": (0.7, "less than was measured, docs/scale.md"),
    "cuda": (0.4, "assumed: no GPU was measured; give --efficiency once yours was"),
}
"""Of the bound, what to expect, and why."""
CALLS = {"tp": "2 each forward pass", "dp": "2 each step, 2 small ones each forward pass"}
"""Collectives by axis; AuxK takes 2 more over either in each forward pass while a latent is dead."""


@dataclass(frozen=True)
class TrainingPlan:
    """What `mlsae plan` prints: bytes, operations and seconds."""

    lm: str
    gpu: str
    dp: int
    tp: int
    n_latents: int
    expansion_factor: float
    sae_parameters: int
    lm_parameters: int
    step_tokens: int
    steps: int
    memory: dict[str, int]
    """Bytes of the busiest rank, by what they hold."""
    memory_bytes: int
    """All of them."""
    capacity_bytes: int
    fits: bool
    advice: list[str]
    """What would fit, if this does not, and what is wasted."""
    checkpoint_bytes: int
    disk_bytes: int
    """Of all checkpoints that there are at once, the SAE and the packed text."""
    flops_per_token: dict[str, int]
    payload_bytes: dict[str, int]
    """Bytes that one rank hands to a step's collectives, by axis; AuxK adds to those over tp while a latent is dead."""
    wire_bytes: dict[str, int]
    """Bytes that it sends for them in a ring."""
    tokens_per_second: dict[str, float]
    """The most that each of these allows."""
    bound: str
    """The tightest."""
    bound_tokens_per_second: float
    expected_fraction: float
    fraction_is: str
    """Where the fraction comes from."""
    hours_at_least: float
    hours_expected: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values by field name."""
        return asdict(self)

    def __str__(self) -> str:
        return _told(self)


def plan(config: PlanConfig) -> TrainingPlan:
    """What a run will take. Reads the language model's config and no weights; raises what `train` would of both."""
    lm = _lm_size(config)
    gpu = here() if config.gpu == "cpu" else gpus.GPUS[config.gpu]
    default: PrecisionName = "float32" if gpu.kind == "cpu" else "bfloat16"
    precision = default if config.precision is None else config.precision
    overrides = (config.gpu_memory, config.gpu_flops, config.gpu_bandwidth, config.link_bandwidth)
    gpu = gpus.given(gpu, *overrides, precision)
    run = _run(config, lm, gpu, precision, default if config.lm_dtype is None else config.lm_dtype)
    run = _laid_out(config, run)
    memory = memory_of(run)
    total, room = sum(memory.values()), capacity(gpu)
    payload, wire = traffic_of(run)
    limits = limits_of(run, wire)
    bound = min(limits, key=lambda name: limits[name])
    fraction, why = FRACTIONS[gpu.kind] if config.efficiency is None else (config.efficiency, "as given")
    checkpoint = costs.checkpoint_bytes(
        run.n_latents, lm.shape.d_model, run.groups, run.n_layers, frame=True, lens=False
    )
    disk = checkpoint * (run.keep_checkpoints + 1)
    disk += costs.sae_bytes(run.n_latents, lm.shape.d_model, run.groups) + costs.token_bytes(run.tokens, lm.d_vocab)
    hours = run.tokens / limits[bound] / 3600
    return TrainingPlan(
        lm=lm.shape.name,
        gpu=gpu.name,
        dp=run.dp,
        tp=run.tp,
        n_latents=run.n_latents,
        expansion_factor=run.n_latents / run.groups / lm.shape.d_model,
        sae_parameters=costs.parameters(run.n_latents, run.groups, lm.shape.d_model),
        lm_parameters=lm.n_parameters,
        step_tokens=run.step_tokens,
        steps=run.tokens // run.step_tokens,
        memory=memory,
        memory_bytes=total,
        capacity_bytes=room,
        fits=total <= room,
        advice=_advice(run, memory, room),
        checkpoint_bytes=checkpoint,
        disk_bytes=disk,
        flops_per_token=flops_of(run),
        payload_bytes=payload,
        wire_bytes=wire,
        tokens_per_second=limits,
        bound=bound,
        bound_tokens_per_second=limits[bound],
        expected_fraction=fraction,
        fraction_is=why,
        hours_at_least=hours,
        hours_expected=hours / fraction,
    )


# ---- the device ------------------------------------------------------------------------------------------------------


def here() -> Gpu:
    """This CPU with torch's threads, timed on products of 1,024 squared and copies of 128 MiB; its memory is what is free."""
    import torch

    from mlsae.devices import free_memory

    device = torch.device("cpu")
    rates = {dtype: _product_rate(getattr(torch, dtype)) for dtype in ("float32", "bfloat16")}
    source, target = torch.ones(1 << 25), torch.empty(1 << 25)
    bandwidth = 2 * source.nbytes / _fastest(lambda: target.copy_(source))
    name = f"this CPU with {torch.get_num_threads()} threads"
    return Gpu(
        name, free_memory(device), rates["bfloat16"], rates["float32"], rates["float32"], bandwidth, bandwidth, "cpu"
    )


def _product_rate(dtype: Any) -> float:
    import torch

    left, right = torch.ones(1024, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    return 2 * 1024**3 / _fastest(lambda: left @ right)


def _fastest(work: Callable[[], Any]) -> float:
    """Seconds of the fastest of twenty calls."""
    seconds = []
    for _ in range(20):
        before = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - before)
    return min(seconds)


# ---- the run ---------------------------------------------------------------------------------------------------------


def _lm_size(config: PlanConfig) -> LMSize:
    """From the language model's config, or as given."""
    shape = (config.d_model, config.n_layers, config.d_vocab, config.n_lm_parameters)
    if config.lm is not None:
        if any(number is not None for number in shape):
            raise ConfigError("lm", "given together with its shape; give one of them")
        return _size_of(config.lm)
    d_model, n_layers, d_vocab, n_parameters = shape
    if d_model is None or n_layers is None or d_vocab is None or n_parameters is None:
        raise ConfigError(
            "lm", "missing; give --lm, or all of --d-model --n-layers --d-vocab --n-lm-parameters in its place"
        )
    blocks = n_parameters - d_vocab * d_model * (1 if config.tied_embeddings else 2)
    if blocks <= 0:
        raise ConfigError("n_lm_parameters", f"{n_parameters} is less than the embeddings; count those too")
    return LMSize(
        LMShape("the language model", n_layers, d_model, None), d_vocab, 4 * d_model, d_model, n_parameters, blocks
    )


def _size_of(name: str) -> LMSize:
    """Counted on a model that is built of nothing but shapes."""
    from mlsae import hub

    source = hub.locate(name, None, weights=False)
    config = hub.read_config(source)
    shape, text = hub.shape_of(source.name, config), config.get_text_config()
    n_parameters, n_block_parameters = hub.count_parameters(config)
    heads, width, d_ff = (getattr(text, key, None) for key in ("num_attention_heads", "head_dim", "intermediate_size"))
    attention = shape.d_model if heads is None or width is None else heads * width
    d_ff = 4 * shape.d_model if d_ff is None else d_ff
    return LMSize(shape, int(text.vocab_size), d_ff, attention, n_parameters, n_block_parameters)


def _run(config: PlanConfig, lm: LMSize, gpu: Gpu, precision: str, lm_dtype: str) -> Run:
    """With every default filled in as training fills it in."""
    names = ("k", "layers", "groups", "tokens", "context_length", "batch_size", "accumulation_steps", "k_aux")
    sizes: dict[str, Any] = {name: getattr(config, name) for name in (*names, "expansion_factor", "n_latents")}
    resolved = resolve(TrainConfig(lm=lm.shape.name, data="-", out="-", **sizes), lm.shape)
    layers = resolved.layers or ()
    return Run(
        lm=lm,
        n_latents=resolved.n_latents or 0,
        groups=config.groups,
        k=config.k,
        k_aux=resolved.k_aux or 0,
        n_layers=len(layers),
        deepest=max(layers) + 1,
        context_length=resolved.context_length or 0,
        batch_size=resolved.batch_size or 0,
        accumulation_steps=resolved.accumulation_steps or 0,
        tokens=config.tokens,
        keep_checkpoints=config.keep_checkpoints,
        precision=precision,
        lm_dtype=lm_dtype,
        dp=1,
        tp=1,
        gpu=gpu,
        per_node=config.gpus_per_node,
        network=config.network_bandwidth * GB,
    )


def _laid_out(config: PlanConfig, run: Run) -> Run:
    """The layout asked for; else, of those that use all ranks, the one with the fewest tp ranks that fits."""
    dp, tp, n = config.dp, config.tp, config.gpus
    if dp is not None and tp is not None:
        if n is not None and dp * tp != n:
            raise ConfigError("gpus", f"{n}; dp {dp} with tp {tp} makes {dp * tp}")
        return replace(run, dp=dp, tp=tp)
    n = (1 if dp is None else dp) * (1 if tp is None else tp) if n is None else n
    known = dp if tp is None else tp
    if known is not None:
        if n % known:
            raise ConfigError("gpus", f"{n} does not divide by {known}; choose a multiple")
        return replace(run, dp=n // tp, tp=tp) if tp is not None else replace(run, dp=known, tp=n // known)
    layouts = [replace(run, dp=n // tp, tp=tp) for tp in range(1, n + 1) if n % tp == 0]
    return next((each for each in layouts if fits(each)), layouts[-1])


# ---- what would be better ------------------------------------------------------------------------------------------------


def _advice(run: Run, memory: dict[str, int], room: int) -> list[str]:
    said = []
    if run.batch_size < run.dp:
        said.append(f"{run.dp - run.batch_size} of {run.dp} dp ranks get no sequence; raise batch_size to {run.dp}")
    elif run.batch_size % run.dp:
        said.append(f"batch_size {run.batch_size} leaves some of {run.dp} dp ranks waiting; choose a multiple")
    if sum(memory.values()) <= room:
        return said
    fixed = memory["language model"] + memory["one block at work"]
    if fixed > room:
        return [*said, f"the language model alone takes {_size(fixed)}; spread it out with lm_device_map"]
    if (tp := smallest_tp(run)) is not None:
        said.append(f"smallest tp that fits: {tp}")
    if (batch := largest_batch(run)) > 0:
        said.append(f"largest batch_size that fits at tp {run.tp}: {batch}")
    if (factor := largest_expansion(run)) > 0:
        said.append(f"largest expansion_factor that fits at tp {run.tp}: {factor}")
    return said if said else ["nothing smaller fits on this device either"]


# ---- in words ----------------------------------------------------------------------------------------------------------


def _told(plan: TrainingPlan) -> str:
    """Everything, a line each."""
    n_ranks = plan.dp * plan.tp
    where = f"{n_ranks} x {plan.gpu}, dp {plan.dp}, tp {plan.tp}" if n_ranks > 1 else plan.gpu
    lines = [
        f"{plan.n_latents:,} latents (x{plan.expansion_factor:g}), {_short(plan.sae_parameters)} parameters, on "
        f"{plan.lm} of {_short(plan.lm_parameters)} parameters; {where}",
        f"{plan.steps:,} steps of {plan.step_tokens:,} tokens",
        "",
        *(f"  {name:<20}{_size(n):>12}" for name, n in plan.memory.items()),
        f"  {'a rank in all':<20}{_size(plan.memory_bytes):>12} of {_size(plan.capacity_bytes)}: "
        + ("it fits" if plan.fits else "it does not fit"),
        *(f"  {line}" for line in plan.advice),
        f"  {'one checkpoint':<20}{_size(plan.checkpoint_bytes):>12}; disk in all {_size(plan.disk_bytes)}",
        "",
        *(f"  {name:<20}{_short(n) + 'FLOP':>12} a token" for name, n in plan.flops_per_token.items()),
    ]
    for axis, calls in CALLS.items():
        if plan.payload_bytes[axis]:
            given, sent = plan.payload_bytes[axis], plan.wire_bytes[axis]
            lines.append(
                f"  {'collectives, ' + axis:<20}{_size(given):>12} a step and rank, {_size(sent)} sent; {calls}"
            )
    return "\n".join(
        [
            *lines,
            "",
            *(f"  {name:<20}{_short(rate):>12} tokens/s at most" for name, rate in plan.tokens_per_second.items()),
            f"Bound: {_short(plan.bound_tokens_per_second)} tokens/s by {plan.bound}, {_time(plan.hours_at_least)} at least.",
            f"Expect {plan.expected_fraction:.0%} of it ({plan.fraction_is}): {_time(plan.hours_expected)}.",
        ]
    )


def _short(number: int | float) -> str:
    """1.41 G, 23.5 k."""
    for size, letter in ((10**12, " T"), (10**9, " G"), (10**6, " M"), (10**3, " k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def _size(n_bytes: int) -> str:
    """1.41 GB, 23.5 MB."""
    return f"{_short(n_bytes)}B"


def _time(hours: float) -> str:
    seconds = 3600 * hours
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} seconds"
