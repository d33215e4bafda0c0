"""What a training config comes to on one language model: every None that has a meaning filled in, the impossible refused."""

from typing import Any

from mlsae.config import LMShape, MLSAEConfig, TrainConfig, check_layers, default_lr
from mlsae.errors import ConfigError


def resolve(config: TrainConfig, lm: LMShape) -> TrainConfig:
    """The same config with every None that has a meaning filled in; refuses what this language model makes impossible."""
    rules = config.rules
    layers = tuple(range(lm.n_layers)) if config.layers is None else config.layers
    check_layers(layers, lm)
    sae = sae_config(config.replaced(layers=layers), lm)
    context = _context_length(config, lm)
    per_step = min(131_072, max(config.tokens // 1000, context))
    batch = config.batch_size or rules.micro_batch or max(1, min(8192, per_step) // context)
    accumulation = config.accumulation_steps or max(1, per_step // (batch * context))
    step_tokens = batch * context * accumulation
    if config.tokens < step_tokens:
        raise ConfigError(
            "tokens", f"{config.tokens} tokens is less than one step ({step_tokens}); raise it or lower batch_size"
        )
    n_steps = config.tokens // step_tokens
    resolved = config.replaced(
        layers=layers,
        n_latents=sae.n_latents,
        expansion_factor=None,
        frame=sae.frame,
        mask_first_position=sae.mask_first_position,
        mask_norm_factor=sae.mask_norm_factor or 0.0,
        context_length=context,
        batch_size=batch,
        accumulation_steps=accumulation,
        data_seed=_first(config.data_seed, config.seed),
        lr=_first(config.lr, rules.lr, default_lr(sae.n_latents // config.groups)),
        warmup_fraction=_first(config.warmup_fraction, rules.warmup_fraction),
        decay_fraction=_first(config.decay_fraction, rules.decay_fraction),
        dead_after_tokens=_first(
            config.dead_after_tokens, rules.dead_after_tokens, max(step_tokens, min(10_000_000, config.tokens // 10))
        ),
        k_aux=_first(config.k_aux, min(256, sae.n_latents)),
        log_every_steps=_first(config.log_every_steps, max(1, n_steps // 200)),
        save_every_steps=_first(config.save_every_steps, max(1, n_steps // 10)),
        validate_every_steps=_first(
            config.validate_every_steps,
            rules.validate_every_forwards and max(1, rules.validate_every_forwards // accumulation),
        ),
    )
    _check_resolved(resolved, step_tokens)
    return resolved


def sae_config(config: TrainConfig, lm: LMShape) -> MLSAEConfig:
    """The SAE that a training config describes for one language model."""
    rules = config.rules
    norm_factor = _first(config.mask_norm_factor, rules.mask_norm_factor)
    size: dict[str, Any] = {"n_latents": config.n_latents, "expansion_factor": config.expansion_factor}
    return MLSAEConfig(
        d_model=lm.d_model,
        **size,
        k=config.k,
        layers=config.layers,
        groups=config.groups,
        frame=_first(config.frame, rules.frame),
        mask_special_tokens=config.mask_special_tokens,
        mask_first_position=_first(config.mask_first_position, rules.mask_first_position),
        mask_norm_factor=norm_factor or None,
        special_tokens=rules.special_tokens,
        recipe=config.recipe,
        lm=lm.name,
        separator_token=config.separator_token,
        data=config.data,
        lens=config.lens,
    )


def _context_length(config: TrainConfig, lm: LMShape) -> int:
    limit = lm.context_length
    if config.context_length is None:
        return min(2048, limit) if limit else 2048
    if limit and config.context_length > limit:
        raise ConfigError("context_length", f"{config.context_length} exceeds the model's {limit}; lower it")
    if config.context_length < 2:
        raise ConfigError("context_length", "1; at least 2 tokens are needed to predict one")
    return config.context_length


def _check_resolved(config: TrainConfig, step_tokens: int) -> None:
    n_latents = config.n_latents or 0
    if (config.k_aux or 0) > n_latents:
        raise ConfigError("k_aux", f"{config.k_aux} exceeds n_latents {n_latents}; lower it, or 0 for off")
    if (config.dead_after_tokens or 0) < step_tokens:
        raise ConfigError(
            "dead_after_tokens",
            f"{config.dead_after_tokens} is less than one step ({step_tokens} tokens), so every latent would be dead "
            f"at once; use at least {step_tokens}",
        )


def _first(*values: Any) -> Any:
    """The first value that is not None: 0 and False are values."""
    return next((value for value in values if value is not None), None)
