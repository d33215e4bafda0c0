"""The rows of tensors in the files of several processes: every reader gets its own, and all of them the whole."""

import itertools

import pytest
import torch

from mlsae import files, manifest
from mlsae.manifest import BY_LATENT, Layout, file_name, read_part, whole_tensors


def saved(folder, shards, groups, size, n_layers=2):
    """An SAE of consecutive numbers in the files of some processes."""
    n = groups * size
    whole = {
        "W_enc": torch.arange(n * 3.0).view(n, 3),
        "W_dec": -torch.arange(n * 3.0).view(n, 3),
        "b_pre": torch.arange(3.0),
        "norm_limit": torch.arange(float(n_layers)),
    }
    for shard in range(shards):
        rows = latents(Layout(groups, size, range(0)).of(shard, shards), groups, size)
        own = {name: t[rows] if BY_LATENT.fullmatch(name) else t for name, t in whole.items()}
        kept = {name: t for name, t in own.items() if shard == 0 or BY_LATENT.fullmatch(name)}
        files.save_tensors(folder / file_name("sae", shard, shards), kept)
    return whole, {name: (t.dtype, tuple(t.shape)) for name, t in whole.items()}


def latents(held, groups, size):
    return [group * size + i for group in range(groups) for i in held]


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("shards", [1, 2, 3, 7])
def test_pieces_in_order_are_the_whole_and_none_is_larger_than_allowed(tmp_path, monkeypatch, groups, shards):
    whole, kinds = saved(tmp_path, shards, groups, 7)
    for rows in (1, 2, 100):
        monkeypatch.setattr(manifest, "PIECE_BYTES", rows * 12)
        with whole_tensors(tmp_path, shards, kinds, groups) as pieces:
            for name, tensor in whole.items():
                parts = list(pieces(name))
                assert torch.equal(torch.cat(parts), tensor)
                assert not BY_LATENT.fullmatch(name) or max(map(len, parts)) <= rows


@pytest.mark.parametrize(("written", "read"), [*itertools.product((1, 2, 3), (1, 2, 5))])
def test_every_reader_gets_its_own_rows_whoever_wrote_them(tmp_path, written, read):
    groups, size = 3, 7
    whole, kinds = saved(tmp_path, written, groups, size)
    for reader in range(read):
        held = Layout(groups, size, range(0)).of(reader, read)
        own = {n: (k, (groups * len(held), *s[1:]) if BY_LATENT.fullmatch(n) else s) for n, (k, s) in kinds.items()}
        found = read_part(tmp_path, "sae", written, own, Layout(groups, size, held))
        for name, tensor in whole.items():
            wanted = tensor[latents(held, groups, size)] if BY_LATENT.fullmatch(name) else tensor
            assert torch.equal(found[name], wanted)
