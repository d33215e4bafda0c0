"""Which device and precision a run uses, and whether what it needs fits: refused before anything is loaded."""

import os
import resource
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from mlsae import costs, files, untrusted
from mlsae.config import TrainConfig
from mlsae.errors import ConfigError, ResourceError
from mlsae.recipes import PrecisionName

SPREADS = ("auto", "balanced", "balanced_low_0", "sequential")
"""Ways to spread a language model over what memory there is; transformers and accelerate say what they are."""
LMPlacement = torch.device | str | dict[str, str]
"""Where a language model is: on one device, spread in one of SPREADS, or by module."""


def choose_device(name: str | None, field: str = "device") -> torch.device:
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
        raise ConfigError(field, f"'{name}' is not here; this machine has {', '.join(devices())}") from error
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


def lm_placement(given: str | Mapping[str, str | int] | None, device: torch.device) -> LMPlacement:
    """Where a language model goes: one device (None: this one), a way to spread it out, or modules and their devices.

    Args:
        given: one of SPREADS, the name of a device, a YAML or JSON file of `module: device`, or such a mapping; its
            devices may also be numbers of GPUs, and `disk`: read from the file whenever they are computed.

    Raises ConfigError for what is none of these, a device that is not here, or a map without the package accelerate.
    """
    if given is None:
        return device
    if isinstance(given, str) and given not in SPREADS and not Path(given).is_file():
        if Path(given).suffix in (".yaml", ".yml", ".json"):
            raise ConfigError("lm_device_map", f"there is no file '{given}'; write one 'module: device' a line")
        return choose_device(given, "lm_device_map")
    if find_spec("accelerate") is None:
        raise ConfigError("lm_device_map", "needs the package accelerate; pip install 'mlsae[device-map]'")
    if isinstance(given, str) and given in SPREADS:
        if (n := int(os.environ.get("LOCAL_WORLD_SIZE", "1"))) > 1:
            raise ConfigError(
                "lm_device_map",
                f"'{given}' given to {n} processes, each of which would fill all devices of this machine; "
                "start one process a machine, or leave it out",
            )
        return given
    found = untrusted.read_yaml(Path(given)) if isinstance(given, str) else given
    if not found:
        raise ConfigError("lm_device_map", "empty; write one 'module: device' a line")
    return {str(module): _mapped_device(module, where) for module, where in found.items()}


def _mapped_device(module: str, where: str | int) -> str:
    """A device as maps name it."""
    if isinstance(where, bool) or not isinstance(where, str | int):
        raise ConfigError("lm_device_map", f"{where!r} given for '{module}'; name a device, cpu or disk")
    named = f"cuda:{where}" if isinstance(where, int) else where
    return named if named == "disk" else str(choose_device(named, "lm_device_map"))


def lm_device(placement: LMPlacement) -> torch.device:
    """The device that computes a language model: of several the first accelerator, which also decides its precision."""
    if isinstance(placement, torch.device):
        return placement
    if isinstance(placement, str):
        return choose_device(None)
    computing = [name for name in placement.values() if name not in ("cpu", "disk")]
    return torch.device(computing[0] if computing else "cpu")


def check_fits(config: TrainConfig, d_model: int, device: torch.device, shared: float = 1.0) -> None:
    """Refuse an SAE that memory or the output's disk cannot hold; `shared` is the device's part of the latents."""
    needed, free = _training_bytes(config, d_model, shared), free_memory(device)
    if needed > free:
        left = max(0, free - _lens_bytes(config, d_model)) / shared
        largest = int(left / costs.TRAINING_BYTES / d_model**2 / config.groups)
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
    return costs.state_bytes(config.n_latents or 0, d_model, shared) + _lens_bytes(config, d_model)


def _checkpoints_bytes(config: TrainConfig, d_model: int) -> int:
    """Of as many as there are at once: the newest is written before the oldest goes."""
    one = costs.CHECKPOINT_BYTES * (config.n_latents or 0) * d_model + _lens_bytes(config, d_model)
    return one * (config.keep_checkpoints + 1)


def _lens_bytes(config: TrainConfig, d_model: int) -> int:
    return 0 if config.lens is None else costs.lens_bytes(len(config.layers or ()), d_model)


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
