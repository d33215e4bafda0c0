"""What this installation has: versions, devices, and who computes the sparse operations, and why."""

import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import torch

from mlsae import devices, ops
from mlsae.ops import cpu

PACKAGES = ("mlsae", "torch", "transformers", "safetensors", "datasets")


@dataclass(frozen=True)
class Info:
    """What `mlsae info` prints."""

    python: str
    packages: dict[str, str]
    """Versions by name."""
    devices: list[str]
    threads: int
    """That torch, and the CPU kernels, use."""
    free_memory: int
    """Bytes, of the default device."""
    ops: dict[str, str]
    """For every `impl`: `ready`, with details, or why it cannot be used on the default device."""
    auto: str
    """The one that `impl="auto"` takes there for float32."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values by field name."""
        return asdict(self)

    def __str__(self) -> str:
        packages = ", ".join(f"{name} {number}" for name, number in self.packages.items())
        states = [f"  {name:10} {state}" for name, state in self.ops.items()]
        return "\n".join(
            [
                f"Python {self.python}, {packages}",
                f"devices: {', '.join(self.devices)}; {self.threads} threads; {self.free_memory / 1e9:.1f} GB free",
                f"sparse operations (impl): auto is {self.auto}",
                *states,
            ]
        )


def info() -> Info:
    """Look around; starts nothing and changes nothing."""
    device = devices.choose_device(None)
    like = torch.empty(0, device=device)
    reasons = {name: ops.unfit(name, like) for name in ops.KERNELS}
    states = {name: f"not usable: {reason}" if reason else "ready" for name, reason in reasons.items()}
    if reasons["cpu"] is None:
        how = "int8 screening, proved" if cpu.screens() else "float32"
        states["cpu"] += f": {cpu.best_level()} ({how}) of {', '.join(cpu.built())}"
    return Info(
        python=platform.python_version(),
        packages={name: version(name) for name in PACKAGES},
        devices=devices.devices(),
        threads=torch.get_num_threads(),
        free_memory=devices.free_memory(device),
        ops=states,
        auto=ops.best_for(like),
    )
