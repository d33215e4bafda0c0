"""What a run needs before its first step: a config without gaps, the language model that it names, and what the SAE will be."""

import os
from pathlib import Path

import torch

from mlsae import devices
from mlsae.config import LMShape, MLSAEConfig, TrainConfig
from mlsae.lm import LanguageModel
from mlsae.resolving import resolve, sae_config


def prepared(config: TrainConfig, shape: LMShape, device: torch.device) -> TrainConfig:
    """The config with everything filled in, once it is known to be possible here."""
    config = resolve(config, shape)
    config = config.replaced(precision=devices.choose_precision(config.precision, device, config.rules.cuda_precision))
    devices.lm_dtype(config.lm_dtype, devices.lm_device(devices.lm_placement(config.lm_device_map, device)))
    return config


def load_lm(config: TrainConfig, device: torch.device) -> LanguageModel:
    """The language model that a config names."""
    return LanguageModel.from_pretrained(
        config.lm,
        device=device,
        dtype=config.lm_dtype,
        device_map=config.lm_device_map,
        separator_token=config.separator_token,
    )


def described_sae(config: TrainConfig, lm: LanguageModel) -> MLSAEConfig:
    """The SAE that a resolved config describes; files are named by their whole path, so that it can be read from anywhere."""
    return sae_config(config, lm.shape).replaced(
        expansion_factor=None,
        lm=_whole_path(lm.name),
        lm_revision=lm.revision,
        data=_whole_path(config.data),
        lens=config.lens and _whole_path(config.lens),
        tokenizer_fingerprint=lm.tokenizer.fingerprint,
    )


def _whole_path(name: str) -> str:
    return str(Path(name).resolve()) if os.path.exists(name) else name
