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
    from mlsae.compare import CompareConfig, Comparison, compare
    from mlsae.config import MLSAEConfig, TrainConfig, TrainerConfig
    from mlsae.convert import Converted, convert
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
    from mlsae.lens import LensQuality, TunedLens, evaluate_lens, train_lens
    from mlsae.lm import LanguageModel
    from mlsae.offlayer import OffLayer, off_layer_matrix
    from mlsae.reproduce import Budget, Reproduction, reproduce
    from mlsae.sae import MLSAE, Code
    from mlsae.sweep import Sweep, sweep
    from mlsae.text import TextSource
    from mlsae.train import Run, train
    from mlsae.trainer import StepReport, Trainer

__all__ = [
    "MLSAE",
    "Analysis",
    "Budget",
    "Code",
    "CompareConfig",
    "Comparison",
    "ConfigError",
    "Converted",
    "DataError",
    "Evaluation",
    "Interrupted",
    "LanguageModel",
    "LensQuality",
    "MLSAEConfig",
    "MlsaeError",
    "ModelError",
    "NumericsError",
    "OffLayer",
    "Reproduction",
    "ResourceError",
    "Run",
    "StepReport",
    "Sweep",
    "TextSource",
    "TokenBlocks",
    "TrainConfig",
    "Trainer",
    "TrainerConfig",
    "TunedLens",
    "analysis",
    "analyze",
    "compare",
    "convert",
    "evaluate",
    "evaluate_lens",
    "off_layer_matrix",
    "pack",
    "reproduce",
    "sweep",
    "train",
    "train_lens",
]

_MODULES = {
    "analyze": ("Analysis", "analyze"),
    "compare": ("CompareConfig", "Comparison", "compare"),
    "config": ("MLSAEConfig", "TrainConfig", "TrainerConfig"),
    "convert": ("Converted", "convert"),
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
    "lens": ("LensQuality", "TunedLens", "evaluate_lens", "train_lens"),
    "lm": ("LanguageModel",),
    "offlayer": ("OffLayer", "off_layer_matrix"),
    "sae": ("MLSAE", "Code"),
    "reproduce": ("Budget", "Reproduction", "reproduce"),
    "sweep": ("Sweep", "sweep"),
    "text": ("TextSource",),
    "train": ("Run", "train"),
    "trainer": ("StepReport", "Trainer"),
}


class _Package(ModuleType):
    """The package, in which the functions named like the files they live in are not hidden by them."""

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
