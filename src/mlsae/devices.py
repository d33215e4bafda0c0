"""Which device and precision a run uses, and whether what it needs fits: refused before anything is loaded."""

import os
import resource
from collections.abc import Sequence
from pathlib import Path

import torch

from mlsae import files
from mlsae.config import TrainConfig
from mlsae.errors import ConfigError, ResourceError
from mlsae.recipes import PrecisionName

TRAINING_BYTES = 32
"""Bytes of training state for each entry of one weight matrix: two matrices, each with gradient and two moments, in float32."""
CHECKPOINT_BYTES = 24
"""Bytes on disk for the same: two matrices, each with two moments."""
LENS_BYTES = 4
"""Bytes of each entry of a tuned lens, which is not trained: in memory, and in every checkpoint."""


def choose_device(name: str | None) -> torch.device:
    """The named device, or the first accelerator, or the CPU. Raises ConfigError if it is not there."""
    if name is None:
        found = torch.accelerator.current_accelerator(check_available=True)
        return found if found is not None else torch.device("cpu")
    try:
        device = torch.device(name)
        if device.type not in {found.partition(":")[0] for found in devices()}:
            raise RuntimeError(f"no {device.type} here")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError("device", f"'{name}' is not here; this machine has {', '.join(devices())}") from error
    return device


def devices() -> list[str]:
    """Names of the devices of this machine."""
    found = ["cpu"]
    if (accelerator := torch.accelerator.current_accelerator(check_available=True)) is not None:
        found += [f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count())]
    return found


def choose_precision(
    precision: PrecisionName | None, device: torch.device, cuda_precision: PrecisionName
) -> PrecisionName:
    """The precision asked for, or the recipe's on CUDA, else float32. Raises ConfigError where the device lacks it."""
    bfloat16 = device.type != "cuda" or torch.cuda.is_bf16_supported()
    if precision is None:
        if device.type != "cuda":
            return "float32"
        return "float32" if cuda_precision == "bfloat16" and not bfloat16 else cuda_precision
    if precision == "float16" and device.type == "cpu":
        raise ConfigError("precision", "float16 is not supported on CPU; use float32 or bfloat16")
    if precision == "bfloat16" and not bfloat16:
        raise ConfigError("precision", f"bfloat16 is not supported on {device}; use float32 or float16")
    return precision


def lm_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The language model's precision: the one asked for, else bfloat16 on CUDA that has it, else float32."""
    if name == "float16" and device.type == "cpu":
        raise ConfigError("lm_dtype", "float16 is not supported on CPU; use float32 or bfloat16")
    if name == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ConfigError("lm_dtype", f"bfloat16 is not supported on {device}; use float32 or float16")
    if name is None:
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    return getattr(torch, name)


def check_fits(config: TrainConfig, d_model: int, device: torch.device, shared: float = 1.0) -> None:
    """Refuse an SAE that memory or the output's disk cannot hold; `shared` is the device's part of the latents."""
    needed, free = _training_bytes(config, d_model, shared), free_memory(device)
    if needed > free:
        left = max(0, free - _lens_bytes(config, d_model)) / shared
        largest = int(left / TRAINING_BYTES / d_model**2 / config.groups)
        raise ConfigError(
            "expansion_factor",
            f"needs about {needed / 1e9:.1f} GB ({_held(config)}); {free / 1e9:.1f} GB free; "
            f"largest expansion that fits: {largest}",
        )
    needed, free = _checkpoints_bytes(config, d_model), files.free_bytes(Path(config.out))
    if needed > free:
        raise ResourceError(
            "out",
            f"{config.keep_checkpoints + 1} checkpoints need {needed / 1e9:.1f} GB; {free / 1e9:.1f} GB free at {config.out}; "
            "free some space or choose another --out",
        )


def check_fit_together(configs: Sequence[TrainConfig], d_model: int, device: torch.device) -> None:
    """Refuse SAEs that each fit and all together do not. The configs are resolved."""
    for config in configs:
        check_fits(config, d_model, device)
    needed, free = sum(_training_bytes(config, d_model) for config in configs), free_memory(device)
    if needed > free:
        held = max(map(_held, configs), key=len)
        raise ConfigError(
            "arms",
            f"{len(configs)} SAEs at once need about {needed / 1e9:.1f} GB ({held}); {free / 1e9:.1f} GB free; "
            "train fewer at once",
        )
    needed = sum(_checkpoints_bytes(config, d_model) for config in configs)
    free = files.free_bytes(Path(configs[0].out))
    if needed > free:
        raise ResourceError(
            "out",
            f"checkpoints of {len(configs)} SAEs need {needed / 1e9:.1f} GB; {free / 1e9:.1f} GB free at {configs[0].out}; "
            "free some space or choose another --out",
        )


def _training_bytes(config: TrainConfig, d_model: int, shared: float = 1.0) -> int:
    return int(TRAINING_BYTES * (config.n_latents or 0) * d_model * shared) + _lens_bytes(config, d_model)


def _checkpoints_bytes(config: TrainConfig, d_model: int) -> int:
    """Of as many as there are at once: the newest is written before the oldest goes."""
    one = CHECKPOINT_BYTES * (config.n_latents or 0) * d_model + _lens_bytes(config, d_model)
    return one * (config.keep_checkpoints + 1)


def _lens_bytes(config: TrainConfig, d_model: int) -> int:
    """A matrix and a bias for each layer."""
    return 0 if config.lens is None else LENS_BYTES * len(config.layers or ()) * d_model * (d_model + 1)


def _held(config: TrainConfig) -> str:
    return "weights, gradients, Adam" + ("" if config.lens is None else ", lens")


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has had in use on the device."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def free_memory(device: torch.device) -> int:
    """Bytes that a new allocation on this device may hope for."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        available = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
        return int(available.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
