"""Two recipes share one code path: what differs between them is data, in `RECIPES` (docs/method.md says what each rule is)."""

from dataclasses import dataclass
from typing import Literal

FrameName = Literal["layer", "vector", "none"]
RecipeName = Literal["standard", "lawson2024"]
FormatName = Literal["mlsae", "lawson2024", "saelens", "sparsify", "dictionary-learning", "openai"]
PrecisionName = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Recipe:
    """One set of training rules. The letters name the defect a rule removes or, in `lawson2024`, keeps."""

    frame: FrameName
    special_tokens: Literal["drop", "zero"]
    """D5: masked vectors are left out, or set to zero and kept."""
    mask_first_position: bool
    mask_norm_factor: float | None
    bias_init: Literal["framed", "raw"]
    """D4: the geometric median is taken in the frame's space, or in the residual stream's."""
    variance: Literal["per_dimension", "all_scalars"]
    """D6: what the squared error is divided by: a fixed variance about each feature's mean, or the batch's over all scalars."""
    aux: Literal["residual", "framed"]
    """D3: AuxK predicts the detached error in the loss's own space, or the raw error with a framed reconstruction."""
    normalize: Literal["after_step", "each_micro_batch"]
    """D7: decoder rows are unit norm after every step, or before each micro-batch's gradient is projected."""
    dead_clock: Literal["tokens", "forwards"]
    """D2: a latent's quiet time is counted in tokens, or in forward passes against a threshold in optimizer steps."""
    validation_counts: bool
    """D8: validation forwards move the dead-latent clock."""
    validation_data: Literal["validation", "train"]
    """D18: validation reads held-out text, or the first blocks of the training stream."""
    order: Literal["shuffled", "file"]
    packing: Literal["carry", "groups"]
    """Remainders are carried on, or every 1,024 documents are packed alone and their last partial block is dropped."""
    lr: float | None
    """None: 2e-4 / sqrt(n_latents / 2^14)."""
    warmup_fraction: float
    decay_fraction: float
    dead_after_tokens: int | None
    """None: 10,000,000 tokens, or a tenth of the run if that is less."""
    micro_batch: int | None
    """Sequences in one forward pass; None: as many as make about 8,192 tokens."""
    validate_every_forwards: int | None
    """Training forward passes between validations; None: never."""
    cuda_precision: PrecisionName


RECIPES: dict[RecipeName, Recipe] = {
    "standard": Recipe(
        frame="layer",
        special_tokens="drop",
        mask_first_position=True,
        mask_norm_factor=10.0,
        bias_init="framed",
        variance="per_dimension",
        aux="residual",
        normalize="after_step",
        dead_clock="tokens",
        validation_counts=False,
        validation_data="validation",
        order="shuffled",
        packing="carry",
        lr=None,
        warmup_fraction=0.02,
        decay_fraction=0.2,
        dead_after_tokens=None,
        micro_batch=None,
        validate_every_forwards=None,
        cuda_precision="bfloat16",
    ),
    "lawson2024": Recipe(
        frame="vector",
        special_tokens="zero",
        mask_first_position=False,
        mask_norm_factor=None,
        bias_init="raw",
        variance="all_scalars",
        aux="framed",
        normalize="each_micro_batch",
        dead_clock="forwards",
        validation_counts=True,
        validation_data="train",
        order="file",
        packing="groups",
        lr=1e-4,
        warmup_fraction=0.0,
        decay_fraction=0.0,
        dead_after_tokens=10_000_000,
        micro_batch=1,
        validate_every_forwards=4096,
        cuda_precision="float16",
    ),
}
