"""Every knob: its range, what it becomes for a language model, and which combinations cannot work."""

import functools
import itertools
import json
import math
import subprocess
import sys
import typing

import pytest

from mlsae.config import Config, LMShape, MLSAEConfig, TrainConfig, TrainerConfig, check_layers, latents_in, load_config
from mlsae.errors import ConfigError
from mlsae.recipes import RECIPES
from mlsae.resolving import resolve, sae_config

PYTHIA = LMShape(name="pythia-70m", n_layers=6, d_model=512, context_length=2048)
TINY = LMShape(name="tiny", n_layers=3, d_model=32, context_length=64)
MATERIALS = {"lm": "a", "data": "b", "out": "c"}


def config(**changes) -> TrainConfig:
    return TrainConfig(**MATERIALS | changes)


def resolved(lm: LMShape = PYTHIA, **changes) -> TrainConfig:
    return resolve(config(**changes), lm)


def step_tokens(found: TrainConfig) -> int:
    return (found.batch_size or 0) * (found.context_length or 0) * (found.accumulation_steps or 0)


def refused(make, field: str) -> str:
    """The message with which something is refused, which must be about `field`."""
    with pytest.raises(ConfigError) as error:
        make()
    assert error.value.field == field, error.value
    return str(error.value)


# ---- fields ----------------------------------------------------------------------------------------------------------


def whole_number_fields(model: type[Config]) -> list[str]:
    """Fields that hold one whole number, found in the types."""

    def kinds(annotation) -> set:
        parts = typing.get_args(annotation)
        origin = typing.get_origin(annotation)
        if origin is typing.Annotated:
            return kinds(parts[0])
        if origin in (tuple, typing.Literal):
            return set()
        return set().union(*map(kinds, parts)) if parts else {annotation}

    return [name for name, field in model.model_fields.items() if kinds(field.annotation) & {int}]


INTEGERS = [(TrainConfig, MATERIALS, name) for name in whole_number_fields(TrainConfig)]
INTEGERS += [(MLSAEConfig, {"d_model": 8, "n_latents": 64, "k": 4}, name) for name in whole_number_fields(MLSAEConfig)]
SMALLEST = {"k_aux": 0, "keep_checkpoints": 2, "seed": -math.inf, "data_seed": -math.inf}


def test_the_fields_found_in_the_types_are_the_ones_there_are():
    names = {name for _, _, name in INTEGERS}
    assert {"k", "groups", "tokens", "k_aux", "seed", "batch_size", "keep_checkpoints", "d_model", "n_latents"} <= names
    assert len(INTEGERS) >= 18


@pytest.mark.parametrize(("model", "base", "name"), INTEGERS, ids=[f"{m.__name__}.{n}" for m, _, n in INTEGERS])
def test_every_whole_number_at_its_edges(model, base, name):
    """0, -1 and the smallest allowed; a fraction, a text and True are no whole numbers."""
    smallest = SMALLEST.get(name, 1)
    for value in (-1, 0, 1, 2):
        if value < smallest:
            assert (
                "must be at least" in refused(functools.partial(model, **base | {name: value}), name)
                or name == "n_latents"
            )
        elif model is TrainConfig:
            assert getattr(model(**base | {name: value}), name) == value
    for value in (1.5, "many", True, [1], math.nan, math.inf):
        if name == "groups" and isinstance(value, float):
            continue  # said of n_latents, which does not split into one and a half
        refused(functools.partial(model, **base | {name: value}), name)


@pytest.mark.parametrize("name", ["tokens", "dead_after_tokens", "init_tokens", "n_latents", "context_length"])
def test_counts_may_be_written_with_an_exponent(name):
    for written in (1e3, "1e3", 1000, "1000"):
        value = getattr(config(**{name: written}), name)
        assert value == 1000
        assert isinstance(value, int)


def test_a_count_keeps_every_digit():
    """A float holds 53 bits: 2^53 + 1 as text must not come out as 2^53."""
    assert config(tokens=str(2**53 + 1)).tokens == 2**53 + 1
    assert config(tokens=2**53 + 1).tokens == 2**53 + 1


def test_a_seed_is_one_that_torch_takes():
    assert config(seed=-1).seed == -1
    assert config(seed=2**63 - 1).seed == 2**63 - 1
    refused(lambda: config(seed=10**30), "seed")


@pytest.mark.parametrize(
    ("name", "bad", "good"),
    [
        ("lr", (0.0, -1e-3, 1.1, math.nan, math.inf), (1e-9, 1.0)),
        ("expansion_factor", (0.0, -1.0, math.nan), (0.5, 256.0)),
        ("warmup_fraction", (-0.1, 1.1, math.nan), (0.0, 1.0)),
        ("adam_eps", (0.0, -1.0, math.nan), (1e-12,)),
        ("clip_grad_norm", (0.0, -1.0, math.nan), (1e-3,)),
        ("aux_coef", (-1.0, math.nan), (0.0, 1.0)),
        ("mask_norm_factor", (-1.0, math.nan), (0.0, 10.0)),
        ("adam_betas", ((0.9,), (0.9, 1.1), (0.9, 0.99, 0.999)), ((0.0, 0.0), [0.9, 0.999])),
    ],
)
def test_real_numbers_at_their_edges(name, bad, good):
    for value in bad:
        with pytest.raises(ConfigError, match=name):
            config(**{name: value})
    for value in good:
        config(**{name: value})


@pytest.mark.parametrize("name", ["lr", "adam_eps", "aux_coef", "dead_threshold"])
def test_infinity_is_no_setting(name):
    """An infinite epsilon trains nothing, an infinite threshold makes every latent dead: both silently."""
    with pytest.raises(ConfigError, match=name):
        config(**{name: math.inf})


def test_0_is_a_value_and_not_a_blank():
    found = resolved(k_aux=0, warmup_fraction=0.0, decay_fraction=0.0, mask_norm_factor=0.0, mask_first_position=False)
    assert (found.k_aux, found.warmup_fraction, found.decay_fraction, found.mask_norm_factor) == (0, 0.0, 0.0, 0.0)
    assert found.mask_first_position is False
    assert sae_config(found, PYTHIA).mask_norm_factor is None
    assert resolved(layers=(0,)).layers == (0,)
    assert resolved(seed=0).seed == 0


def test_switches_take_only_true_and_false():
    for value in (0, 1, "yes", "false", None):
        refused(lambda value=value: config(repeat=value), "repeat")


def test_an_unknown_key_names_its_nearest():
    assert "did you mean 'expansion_factor'?" in refused(lambda: config(expasion_factor=2), "expasion_factor")
    assert "known keys: " in refused(lambda: config(zzz=2), "zzz")


def test_a_missing_key_is_named():
    assert "give --lm" in refused(lambda: TrainConfig(data="b", out="c"), "lm")


def test_configs_are_frozen():
    for made in (config(), MLSAEConfig(d_model=8), TrainerConfig()):
        with pytest.raises((ConfigError, ValueError)):
            made.k = 3  # ty: ignore[invalid-assignment]
    assert config().replaced(k=3).k == 3
    refused(lambda: config().replaced(k=0), "k")


@pytest.mark.parametrize(
    "made",
    [
        config(),
        config(layers=(0, 2), tokens=1e6, lr=2e-4, recipe="lawson2024"),
        resolved(tokens=10**6),
        MLSAEConfig(d_model=8),
        MLSAEConfig(d_model=8, n_latents=24, k=2, layers=(3, 1), groups=2, frame="vector", mask_norm_factor=None),
        TrainerConfig(adam_betas=(0.5, 0.6)),
    ],
)
def test_to_dict_is_plain_json_and_makes_the_same_config_again(made):
    plain = made.to_dict()
    assert list(plain) == list(type(made).model_fields)
    assert type(made)(**json.loads(json.dumps(plain))) == made


def test_load_config_gives_only_known_keys(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("k: 4\ntokens: 1e6\n")
    assert load_config(path) == {"k": 4, "tokens": 1e6}
    path.write_text("k: 4\n1: 2\n")
    with pytest.raises(ConfigError, match="unknown key '1'"):
        load_config(path)


def test_an_error_tells_the_field_inside_a_list():
    with pytest.raises(ConfigError, match=r"layers\.1"):
        config(layers=[0, "x"])


# ---- the size of the dictionary --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("d_model", "factor", "groups"), list(itertools.product((6, 512), (0.5, 1, 16, 64.0), (1, 3))))
def test_either_size_gives_the_other(d_model, factor, groups):
    size = {"d_model": d_model, "groups": groups, "k": 1}
    one, other = MLSAEConfig(**size, expansion_factor=float(factor)), None
    assert one.n_latents == d_model * factor * groups
    other = MLSAEConfig(**size, n_latents=one.n_latents)
    assert other == one == MLSAEConfig(**size, n_latents=one.n_latents, expansion_factor=float(factor))


def test_sizes_that_disagree_or_are_not_whole():
    assert MLSAEConfig(d_model=10).n_latents == 160
    refused(lambda: MLSAEConfig(d_model=10, n_latents=40, expansion_factor=5.0), "n_latents")
    refused(lambda: MLSAEConfig(d_model=10, n_latents=41, groups=2), "n_latents")
    assert "= 3.2 latents" in refused(lambda: MLSAEConfig(d_model=32, expansion_factor=0.1, k=1), "expansion_factor")
    refused(lambda: config(n_latents=64, expansion_factor=2.0), "n_latents")
    for d_model, factor in ((10, 0.05), (10, math.nan), (10, math.inf), (10, -1.0)):
        refused(lambda d=d_model, f=factor: latents_in(d, f), "expansion_factor")


def test_k_fits_each_dictionary():
    assert MLSAEConfig(d_model=8, n_latents=8, k=8).k == 8
    refused(lambda: MLSAEConfig(d_model=8, n_latents=8, k=9), "k")
    refused(lambda: MLSAEConfig(d_model=8, n_latents=16, k=9, groups=2), "k")


# ---- layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ((), "empty"),
        ((6,), "6 is out of range; pythia-70m has layers 0-5"),
        ((0, 10**9), "1000000000 is out of range"),
        ((-1,), "-1 is out of range; use 5 for the last"),
        ((-6,), "-6 is out of range"),
        ((2, 0, 2), "2 is given twice"),
    ],
)
def test_layers_that_are_not_there(layers, said):
    assert said in refused(lambda: check_layers(layers, PYTHIA), "layers")
    assert said in refused(lambda: resolved(layers=layers), "layers")


def test_layers_are_ids_in_the_order_given():
    for layers in ((0,), (5,), (0, 5), (5, 0), tuple(range(6))):
        found = resolved(layers=layers)
        assert found.layers == layers
        assert sae_config(found, PYTHIA).layers == layers
    assert resolved().layers == tuple(range(6))
    assert refused(lambda: MLSAEConfig(d_model=8, layers=(-1,)), "layers")
    assert refused(lambda: MLSAEConfig(d_model=8, layers=()), "layers")


def test_no_more_groups_than_layers():
    assert resolved(groups=6).groups == 6
    refused(lambda: resolved(groups=7), "groups")
    refused(lambda: config(groups=3, layers=(0, 1)), "groups")


# ---- resolve ---------------------------------------------------------------------------------------------------------


def test_a_long_run_takes_the_published_step():
    found = resolved(tokens=1e9)
    assert step_tokens(found) == 131_072
    assert (found.batch_size, found.context_length, found.accumulation_steps) == (4, 2048, 16)


@pytest.mark.parametrize("lm", [PYTHIA, TINY, LMShape("bloom", 24, 64, None), LMShape("gpt2", 12, 768, 1024)])
@pytest.mark.parametrize("tokens", [10**5, 10**6, 3 * 10**7, 10**8, 10**9, 10**10])
def test_a_small_run_has_about_a_thousand_steps(lm, tokens):
    """No step is longer than a thousandth of the run, unless one sequence is; none is longer than the published one."""
    found = resolved(lm, tokens=tokens, k=4)
    context = found.context_length or 0
    assert context == min(2048, lm.context_length or 2048)
    assert step_tokens(found) <= max(tokens // 1000, context)
    assert tokens // step_tokens(found) >= min(1000, tokens // context)
    assert step_tokens(found) <= 131_072


def test_what_is_given_is_kept():
    given = {"context_length": 128, "batch_size": 3, "accumulation_steps": 2, "lr": 3e-4, "k_aux": 7, "frame": "none"}
    given |= {"dead_after_tokens": 5000, "log_every_steps": 9, "save_every_steps": 8, "validate_every_steps": 6}
    found = resolved(tokens=10**6, **given)
    assert {key: getattr(found, key) for key in given} == given


def test_resolving_twice_is_resolving_once_and_leaves_no_blank():
    optional = {"n_latents", "expansion_factor", "clip_grad_norm", "separator_token", "device", "lm_dtype", "log_to"}
    optional |= {"lens", "lm_device_map"}
    for recipe in RECIPES:
        found = resolved(tokens=10**7, recipe=recipe)
        assert resolve(found, PYTHIA) == found
        blank = {name for name in TrainConfig.model_fields if getattr(found, name) is None}
        assert blank <= optional | {"precision", "validate_every_steps"}


def test_the_standard_rules():
    found = resolved(tokens=10**9)
    assert found.frame == "layer"
    assert found.mask_first_position is True
    assert found.mask_norm_factor == 10.0
    assert found.lr == pytest.approx(2e-4 / math.sqrt(512 * 16 / 2**14))
    assert found.dead_after_tokens == 10_000_000
    assert resolved(tokens=10**6).dead_after_tokens == 100_000
    assert found.k_aux == 256
    assert resolved(TINY, tokens=10**6, expansion_factor=2.0).k_aux == 64
    assert found.validate_every_steps is None


def test_the_learning_rate_goes_by_the_size_of_one_dictionary():
    whole, split = resolved(tokens=10**7), resolved(tokens=10**7, groups=6)
    assert split.n_latents == 6 * whole.n_latents
    assert split.lr == whole.lr


def test_the_published_rules():
    found, rules = resolved(tokens=10**9, recipe="lawson2024"), RECIPES["lawson2024"]
    assert (found.lr, found.frame, found.batch_size, found.accumulation_steps) == (1e-4, "vector", 1, 64)
    assert (found.warmup_fraction, found.decay_fraction) == (0.0, 0.0)
    assert (found.dead_after_tokens, found.k_aux, found.aux_coef) == (10_000_000, 256, 1 / 32)
    assert found.validate_every_steps == 4096 // 64
    assert (found.adam_betas, found.adam_eps, found.seed, found.validation_sequences) == (
        (0.9, 0.999),
        6.25e-10,
        42,
        512,
    )
    assert found.mask_first_position is False
    assert sae_config(found, PYTHIA).mask_norm_factor is None
    assert sae_config(found, PYTHIA).special_tokens == "zero"
    assert (rules.bias_init, rules.variance, rules.aux, rules.normalize) == (
        "raw",
        "all_scalars",
        "framed",
        "each_micro_batch",
    )
    assert (rules.dead_clock, rules.validation_counts, rules.validation_data) == ("forwards", True, "train")
    assert (rules.order, rules.packing, rules.cuda_precision) == ("file", "groups", "float16")


@pytest.mark.parametrize("recipe", RECIPES)
def test_less_than_one_step_is_refused(recipe):
    """At the edge: exactly a step is a run of one."""
    shape = {"context_length": 64, "batch_size": 4, "accumulation_steps": 2, "dead_after_tokens": 512, "recipe": recipe}
    assert "511 tokens is less than one step (512)" in refused(lambda: resolved(tokens=511, **shape), "tokens")
    found = resolved(tokens=512, **shape)
    assert (found.log_every_steps, found.save_every_steps) == (1, 1)


def test_the_context_has_the_models_limit():
    assert resolved(TINY, context_length=64).context_length == 64
    refused(lambda: resolved(TINY, context_length=65), "context_length")
    refused(lambda: resolved(TINY, context_length=1), "context_length")
    assert resolved(LMShape("bloom", 3, 32, None), context_length=10**5, tokens=10**9).context_length == 10**5


def test_dead_at_once_is_refused():
    shape = {"tokens": 10**6, "context_length": 64, "batch_size": 2, "accumulation_steps": 1}
    assert resolved(**shape, dead_after_tokens=128).dead_after_tokens == 128
    assert "use at least 128" in refused(lambda: resolved(**shape, dead_after_tokens=127), "dead_after_tokens")


def test_k_aux_is_no_more_than_there_are():
    assert resolved(TINY, tokens=10**6, k_aux=512).k_aux == 512
    refused(lambda: resolved(TINY, tokens=10**6, k_aux=513), "k_aux")


def test_a_schedule_longer_than_the_run():
    refused(lambda: config(warmup_fraction=0.6, decay_fraction=0.6), "warmup_fraction")
    assert config(warmup_fraction=0.5, decay_fraction=0.5).warmup_fraction == 0.5


def test_a_schedule_that_the_recipe_completes_fits_too():
    """Warm-up alone is given: with the recipe's decay it is still no longer than the run."""
    refused(lambda: resolved(tokens=10**8, warmup_fraction=0.9), "warmup_fraction")


# ---- weight ----------------------------------------------------------------------------------------------------------


def test_config_cli_and_errors_are_light():
    """A wrong config costs no import of torch."""
    script = (
        "import sys, mlsae.config, mlsae.cli, mlsae.errors\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'numpy', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"
