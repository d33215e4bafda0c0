"""Devices and precisions that are not there, and runs that do not fit, are refused before anything is loaded."""

import contextlib
import re

import pytest
import torch

from mlsae import costs, devices, files
from mlsae.config import LMShape, TrainConfig
from mlsae.errors import ConfigError, ResourceError
from mlsae.resolving import resolve, sae_config
from mlsae.sae import MLSAE

torch.set_num_threads(1)
CPU = torch.device("cpu")
SHAPE = LMShape("lm", 3, 64, 32)
needs_no_accelerator = pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has an accelerator")


def config(d_model=64, **changes):
    shape = LMShape("lm", 3, d_model, 32)
    return resolve(TrainConfig(lm="lm", data="text", **{"out": "run", "tokens": 10_000, **changes}), shape)


def test_the_cpu_is_a_device():
    assert devices.choose_device("cpu") == CPU
    assert "cpu" in devices.devices()


@needs_no_accelerator
def test_without_an_accelerator_it_is_the_cpu():
    assert devices.choose_device(None) == CPU
    assert devices.devices() == ["cpu"]


@pytest.mark.parametrize("name", ["cuda:99", "mps:3", "gpu", "", "cpu:x", "meta", "xpu", "vulkan", "hpu"])
def test_a_device_that_is_not_here_is_refused_listing_those_that_are(name):
    with pytest.raises(ConfigError, match=f"device: '{name}' is not here; this machine has cpu") as caught:
        devices.choose_device(name)
    assert caught.value.exit_code == 2


def test_float16_on_a_cpu_is_refused():
    with pytest.raises(ConfigError, match=r"^precision: float16 is not supported on CPU; use float32 or bfloat16"):
        devices.choose_precision("float16", CPU, "bfloat16")
    with pytest.raises(ConfigError, match=r"^lm_dtype: float16 is not supported on CPU; use float32 or bfloat16"):
        devices.lm_dtype("float16", CPU)


@pytest.mark.parametrize("cuda_precision", ["bfloat16", "float16"])
def test_on_a_cpu_the_precision_is_float32_unless_asked_for(cuda_precision):
    assert devices.choose_precision(None, CPU, cuda_precision) == "float32"
    assert devices.choose_precision("bfloat16", CPU, cuda_precision) == "bfloat16"
    assert devices.lm_dtype(None, CPU) == torch.float32
    assert devices.lm_dtype("bfloat16", CPU) == torch.bfloat16


@pytest.mark.parametrize("has_bfloat16", [False, True])
def test_an_old_accelerator_has_no_bfloat16(monkeypatch, has_bfloat16):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: has_bfloat16)
    cuda = torch.device("cuda")
    assert devices.choose_precision(None, cuda, "bfloat16") == ("bfloat16" if has_bfloat16 else "float32")
    assert devices.choose_precision(None, cuda, "float16") == "float16"
    assert devices.lm_dtype(None, cuda) == (torch.bfloat16 if has_bfloat16 else torch.float32)
    if not has_bfloat16:
        with pytest.raises(ConfigError, match="bfloat16 is not supported on cuda"):
            devices.choose_precision("bfloat16", cuda, "bfloat16")
        with pytest.raises(ConfigError, match="bfloat16 is not supported on cuda"):
            devices.lm_dtype("bfloat16", cuda)


@pytest.mark.parametrize("lens", [None, "lens"])
@pytest.mark.parametrize("groups", [1, 3])
def test_an_sae_that_memory_cannot_hold_is_refused_with_the_largest_that_fits(monkeypatch, groups, lens):
    """The factor named does fit, and the next one does not."""
    monkeypatch.setattr(devices, "free_memory", lambda device: 10_000_000)
    with pytest.raises(
        ConfigError, match=r"needs about \d+\.\d GB .*; 0\.0 GB free; largest expansion that fits: \d+"
    ) as caught:
        devices.check_fits(config(expansion_factor=1000, groups=groups, lens=lens), 64, CPU)
    assert caught.value.field == "expansion_factor"
    largest = int(re.search(r"fits: (\d+)", str(caught.value))[1])
    assert largest > 1
    devices.check_fits(config(expansion_factor=largest, groups=groups, lens=lens), 64, CPU)
    with pytest.raises(ConfigError):
        devices.check_fits(config(expansion_factor=largest + 1, groups=groups, lens=lens), 64, CPU)


def test_a_disk_that_cannot_hold_the_checkpoints_is_refused(monkeypatch, tmp_path):
    """One more than are kept: the newest is written before the oldest goes."""
    small = config(out=str(tmp_path / "run"), expansion_factor=16, keep_checkpoints=3)
    needed = 4 * costs.CHECKPOINT_BYTES * 64 * 64 * 16
    monkeypatch.setattr(files, "free_bytes", lambda path: needed)
    devices.check_fits(small, 64, CPU)
    monkeypatch.setattr(files, "free_bytes", lambda path: needed - 1)
    with pytest.raises(ResourceError, match=r"out: 4 checkpoints need 0\.0 GB; 0\.0 GB free at ") as caught:
        devices.check_fits(small, 64, CPU)
    assert str(tmp_path) in str(caught.value)
    assert caught.value.exit_code == 4


def test_what_is_counted_of_a_lens_is_what_an_sae_holds_of_it(monkeypatch, tmp_path):
    """In memory and in each checkpoint; a memory or a disk of just that size is enough, a byte less is not."""
    plain, lensed = (config(out=str(tmp_path / "run"), expansion_factor=2, lens=lens) for lens in (None, "folder"))
    bare, held = (MLSAE(sae_config(each, SHAPE)).state_dict() for each in (plain, lensed))
    n_bytes = sum(held[name].nbytes for name in held.keys() - bare.keys())
    assert n_bytes == 4 * 3 * 64 * 65
    trained, saved = 32 * 64 * 128, 24 * 64 * 128
    for n, configs in ((1, [lensed]), (2, [plain, lensed])):
        memory = n * trained + n_bytes
        disk = sum(saved + n_bytes * (each is lensed) for each in configs) * (lensed.keep_checkpoints + 1)
        for short, error in ((0, None), (1, ConfigError), (2, ResourceError)):
            monkeypatch.setattr(devices, "free_memory", lambda device, free=memory - (short == 1): free)
            monkeypatch.setattr(files, "free_bytes", lambda path, free=disk - (short == 2): free)
            refused = pytest.raises(error) if error is not None else contextlib.nullcontext()
            with refused:
                if n == 1:
                    devices.check_fits(lensed, 64, CPU)
                else:
                    devices.check_fit_together(configs, 64, CPU)
    monkeypatch.setattr(devices, "free_memory", lambda device: n_bytes - 1)
    with pytest.raises(ConfigError, match=r"\(weights, gradients, Adam, lens\); .* largest expansion that fits: 0$"):
        devices.check_fits(lensed, 64, CPU)


def test_free_memory_is_a_number_this_machine_could_have():
    assert 1e7 < devices.free_memory(CPU) < 1e14
