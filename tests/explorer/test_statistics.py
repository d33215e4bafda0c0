"""The arrays are those of the sums on the disk, and one latent's numbers exactly so."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mlsae.analysis.layers import LayerStatistics
from mlsae.errors import ModelError
from mlsae.explorer.statistics import Statistics, read_interval

LAYERS = tuple(range(6))


@pytest.fixture(scope="module")
def sums(tiny_run: Path) -> LayerStatistics:
    return LayerStatistics.load(tiny_run / "analysis" / "layers.safetensors")


@pytest.fixture(scope="module")
def found(tiny_run: Path) -> Statistics:
    return Statistics.read(tiny_run / "analysis" / "layers.safetensors", LAYERS, 128)


def test_arrays_are_those_of_the_sums(found: Statistics, sums: LayerStatistics):
    depth = sums.distribution()
    assert found.n_tokens == sums.n_tokens
    for got, want in (
        (found.probability, depth.probability),
        (found.density, sums.density()),
        (found.mean_activation, sums.totals / sums.counts),
    ):
        assert got.dtype == np.float32
        assert torch.equal(torch.from_numpy(got).isnan(), want.isnan())
        assert torch.allclose(torch.from_numpy(got).double(), want, rtol=1e-6, equal_nan=True)
    assert torch.allclose(torch.from_numpy(found.centre_of_mass), depth.centre_of_mass, rtol=1e-14, equal_nan=True)
    assert np.array_equal(found.used, depth.used.numpy())


def test_one_latent_is_read_exactly(found: Statistics, sums: LayerStatistics):
    for latent in (0, 77, 127):
        one = found.of(latent)
        assert set(one) == {"totals", "counts", "persisted", "n_events", "effective_layers"}
        for name, got in one.items():
            assert torch.equal(got[..., 0], getattr(sums, name)[..., latent]), name


def test_latents_of_one_layer_are_in_the_order_of_their_ids(tmp_path: Path):
    """Worked by hand: 3 and 1 live at layer 0 alone, 0 at layer 2 alone, 4 between, 2 nowhere."""
    sums = LayerStatistics(3, 5)
    totals = torch.tensor([[0.0, 0.3, 0, 0.7, 1], [0, 0, 0, 0, 1], [0.1, 0, 0, 0, 1]], dtype=torch.float64)
    sums.by_shard["totals"][0] = totals
    sums.save(tmp_path / "x.safetensors")
    found = Statistics.read(tmp_path / "x.safetensors", (0, 1, 2), 5)
    assert found.ordered.latent.tolist() == [1, 3, 4, 0]
    assert found.ordered.probability[:, 2] == pytest.approx([1 / 3] * 3)
    assert np.isnan(found.probability[:, 2]).all()


def test_equal_ones_keep_their_order_however_many_there_are(tmp_path: Path):
    sums = LayerStatistics(3, 3000)
    sums.by_shard["totals"][0, torch.arange(3000) % 3, torch.arange(3000)] = 1
    sums.save(tmp_path / "x.safetensors")
    found = Statistics.read(tmp_path / "x.safetensors", (0, 1, 2), 3000)
    assert found.ordered.latent.tolist() == [*range(0, 3000, 3), *range(1, 3000, 3), *range(2, 3000, 3)]


def test_places_between_layers_are_taken_to_their_ids(found: Statistics):
    assert found.on_layers(1.25) == 1.25


@pytest.mark.parametrize(
    ("name", "value"), [("totals", -1.0), ("totals", torch.nan), ("totals", torch.inf), ("tokens", -1)]
)
def test_sums_that_cannot_be_are_refused(tmp_path: Path, name: str, value: float):
    sums = LayerStatistics(3, 5)
    sums.by_shard[name].view(-1)[0] = value
    sums.save(tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match="analyze again"):
        Statistics.read(tmp_path / "x.safetensors", (0, 1, 2), 5)


def test_other_sizes_are_refused(tiny_run: Path):
    analysis = tiny_run / "analysis"
    for layers, n_latents in ((LAYERS[:5], 128), (LAYERS, 127)):
        with pytest.raises(ModelError, match="shape"):
            Statistics.read(analysis / "layers.safetensors", layers, n_latents)
        with pytest.raises(ModelError, match="shape"):
            read_interval(analysis / "profile.safetensors", 0, len(layers), n_latents)
