"""Train one sparse autoencoder on every layer of a language model, say how good it is, and see where its latents live.

Names load on first use, so that importing mlsae costs nothing and prints nothing.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlsae import analysis
    from mlsae.analyze import Analysis, analyze
    from mlsae.config import MLSAEConfig, TrainConfig, TrainerConfig
    from mlsae.data import TokenBlocks, pack
    from mlsae.errors import (
        ConfigError,
        DataError,
        Interrupted,
        MlsaeError,
        ModelError,
        NumericsError,
        ResourceError,
    )
    from mlsae.evaluate import Evaluation, evaluate
    from mlsae.lm import LanguageModel
    from mlsae.sae import MLSAE, Code
    from mlsae.text import TextSource
    from mlsae.train import Run, train
    from mlsae.trainer import StepReport, Trainer

__all__ = [
    "MLSAE",
    "Analysis",
    "Code",
    "ConfigError",
    "DataError",
    "Evaluation",
    "Interrupted",
    "LanguageModel",
    "MLSAEConfig",
    "MlsaeError",
    "ModelError",
    "NumericsError",
    "ResourceError",
    "Run",
    "StepReport",
    "TextSource",
    "TokenBlocks",
    "TrainConfig",
    "Trainer",
    "TrainerConfig",
    "analysis",
    "analyze",
    "evaluate",
    "pack",
    "train",
]

_MODULES = {
    "analyze": ("Analysis", "analyze"),
    "config": ("MLSAEConfig", "TrainConfig", "TrainerConfig"),
    "data": ("TokenBlocks", "pack"),
    "errors": (
        "ConfigError",
        "DataError",
        "Interrupted",
        "MlsaeError",
        "ModelError",
        "NumericsError",
        "ResourceError",
    ),
    "evaluate": ("Evaluation", "evaluate"),
    "lm": ("LanguageModel",),
    "sae": ("MLSAE", "Code"),
    "text": ("TextSource",),
    "train": ("Run", "train"),
    "trainer": ("StepReport", "Trainer"),
}


class _Package(ModuleType):
    """The package, in which the functions `train`, `evaluate` and `analyze` are not hidden by the files they live in."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in __all__ and name != "analysis" and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        for module, names in _MODULES.items():
            if name in names:
                return getattr(import_module(f"mlsae.{module}"), name)
        if name == "analysis":
            return import_module("mlsae.analysis")
        raise AttributeError(f"module 'mlsae' has no attribute '{name}'")

    def __dir__(self) -> list[str]:
        return __all__


sys.modules[__name__].__class__ = _Package
