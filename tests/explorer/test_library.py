"""What there is to show: all of it, or a sentence and a command; never an exception for a file of others."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from mlsae import MLSAE, files
from mlsae.analysis.layers import LayerStatistics
from mlsae.config import MLSAEConfig
from mlsae.errors import ModelError
from mlsae.explorer.answers import json_bytes
from mlsae.explorer.heatmap import heatmap_bytes
from mlsae.explorer.kept import Kept
from mlsae.explorer.latents import latent_view, neighbours_view
from mlsae.explorer.library import Library
from mlsae.explorer.overview import overview_view
from mlsae.explorer.table import SearchRequest, search_view
from mlsae.explorer.training import training_view


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy to harm."""
    return Path(shutil.copytree(tiny_run, tmp_path / "a run", ignore=shutil.ignore_patterns("step-*")))


def what(library: Library) -> set[str]:
    return {item["what"] for item in library.missing()}


def why(library: Library, name: str) -> str:
    return next(item["why"] for item in library.missing(name))


def all_views(library: Library) -> dict[str, dict]:
    """Every page that needs no language model, as JSON that can be sent."""
    views = {
        "overview": overview_view(library),
        "search": search_view(library, SearchRequest(token="a", promoted="e")),
        "plain search": search_view(library, SearchRequest()),
        "training": training_view(library.training),
    }
    if library.n_latents:
        views["latent"] = latent_view(library, int(library.n_latents // 2))
    return {name: json.loads(json_bytes(view)) for name, view in views.items()}


# ---- what is there -------------------------------------------------------------------------------------------------


def test_of_a_whole_run_nothing_is_missing(run: Path):
    library = Library.open(run)
    library.load_tokenizer()
    assert library.missing() == []
    assert (library.name, library.layers, library.n_latents) == ("a run", (0, 1, 2, 3, 4, 5), 128)
    assert library.sae is library.sae
    assert library.lm_name == library.sae.config.lm
    assert Library.open(run, lm="another").lm_name == "another"
    assert library.analysis == run / "analysis"


def test_the_sae_in_a_run_is_opened_as_the_run(run: Path):
    library = Library.open(run / "sae")
    assert (library.run, library.missing("analysis", "evaluation")) == (run, [])


def test_an_sae_alone_says_what_makes_the_rest(run: Path, tmp_path: Path):
    alone = Path(shutil.copytree(run / "sae", tmp_path / "alone"))
    library = Library.open(alone)
    assert {item["what"]: item["command"] for item in library.missing()} == {
        "evaluation": f"mlsae evaluate {alone}",
        "analysis": f"mlsae analyze {alone} --out DIR",
    }
    assert (library.run, library.statistics, library.evaluation, library.sae.config.k) == (None, None, None, 4)
    assert all_views(library)["latent"]["summary"] is None
    elsewhere = Library.open(alone, analysis=run / "analysis")
    assert what(elsewhere) == {"evaluation"}
    assert elsewhere.statistics.n_tokens == Library.open(run).statistics.n_tokens


def test_saes_of_other_formats_are_opened(tmp_path: Path):
    from mlsae import convert

    sae = MLSAE(MLSAEConfig(d_model=8, n_latents=16, k=2, layers=(3,), frame="none", mask_norm_factor=None))
    sae.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs", to="sparsify")
    library = Library.open(tmp_path / "theirs")
    assert (library.n_latents, library.layers, library.run) == (16, (3,), None)
    assert what(library) == {"evaluation", "analysis"}
    all_views(library)


def test_nothing_to_open_is_refused(tmp_path: Path):
    for source in (tmp_path, tmp_path / "absent", tmp_path / ("x" * 3000)):
        with pytest.raises(ModelError, match="sae: "):
            Library.open(source)


# ---- what comes later ----------------------------------------------------------------------------------------------


def test_a_run_without_an_sae_shows_what_it_has_and_the_sae_when_it_comes(run: Path, tmp_path: Path):
    for name in ("sae", "analysis"):
        shutil.move(run / name, tmp_path / name)
    (run / "evaluation.json").unlink()
    library = Library.open(run)
    assert (library.config, library.sae, library.layers) == (None, None, ())
    assert what(library) == {"sae", "evaluation", "analysis"}
    assert library.lm_name == json.loads((run / "config.json").read_text())["lm"]
    views = all_views(library)
    assert views["overview"]["sae"]["k"] == 4
    assert views["overview"]["training"] == {"finished": False, "config": library.training.config}
    assert views["training"]["points"]
    with pytest.raises(ModelError, match="not saved one yet"):
        latent_view(library, 0)
    shutil.move(tmp_path / "sae", run / "sae")
    assert (library.n_latents, library.sae.config.k) == (128, 4)
    assert what(library) == {"evaluation", "analysis"}
    shutil.move(tmp_path / "analysis", run / "analysis")
    assert what(library) == {"evaluation"}
    assert library.statistics is not None


def test_an_analysis_that_was_there_before_the_sae_is_checked_when_it_comes(run: Path, tmp_path: Path):
    shutil.move(run / "sae", tmp_path / "sae")
    library = Library.open(run)
    all_views(library)
    shutil.move(tmp_path / "sae", run / "sae")
    assert library.missing() == []
    assert library.table is not None


def test_an_analysis_of_other_layers_is_found_out_when_the_sae_comes(run: Path, tmp_path: Path):
    shutil.move(run / "sae", tmp_path / "sae")
    summary = json.loads((run / "analysis" / "summary.json").read_text())
    files.write_json(run / "analysis" / "summary.json", {**summary, "layers": [0, 1]})
    library = Library.open(run)
    all_views(library)
    shutil.move(tmp_path / "sae", run / "sae")
    assert "other layers" in why(library, "analysis")
    assert library.statistics is None


def test_an_analysis_being_written_is_not_shown(run: Path):
    library = Library.open(run)
    assert library.statistics is not None
    summary = (run / "analysis" / "summary.json").read_bytes()
    (run / "analysis" / "summary.json").unlink()
    assert (library.statistics, library.table, library.examples, library.similarity) == (None, None, None, None)
    assert what(library) == {"analysis"}
    (run / "analysis" / "summary.json").write_bytes(summary)
    assert library.statistics is not None


def test_files_are_read_again_only_when_they_change(tmp_path: Path):
    path, read = tmp_path / "x.json", []
    kept = Kept([path], lambda: read.append(1) or path.read_text())
    assert (kept.get(), kept.problem, len(read)) == (None, None, 0)
    files.write_text(path, "one")
    assert [kept.get() for _ in range(3)] == ["one"] * 3
    files.write_text(path, "two")
    assert (kept.get(), len(read)) == ("two", 2)


def test_many_threads_read_once(run: Path):
    library = Library.open(run)
    with ThreadPoolExecutor(8) as pool:
        found = list(
            pool.map(lambda _: (library.statistics, library.table, library.sae, library.load_tokenizer()), range(32))
        )
    assert all(a is b for row in found for a, b in zip(row, found[0], strict=True))


# ---- what is damaged or of others ------------------------------------------------------------------------------------

OF_ANALYSIS = {
    "summary.json": "analysis",
    "layers.safetensors": "analysis",
    "similarity.json": "similarity",
    "latents.parquet": "table",
    "profile.safetensors": "intervals",
    "examples.parquet": "examples",
}
DAMAGES = {
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "noise": lambda data: np.random.default_rng(0).bytes(len(data)),
    "no object": lambda data: b"[1, 2]",
    "start only": lambda data: data[:8],
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [*OF_ANALYSIS, "../evaluation.json"])
def test_a_damaged_file_is_a_sentence_and_the_rest_is_shown(run: Path, name: str, damage: str):
    path = run / "analysis" / name
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    library = Library.open(run)
    all_views(library)
    wanted = OF_ANALYSIS.get(name, "evaluation")
    assert wanted in what(library)
    assert path.name in why(library, wanted)
    assert str(run) not in why(library, wanted)
    assert (library.evaluation is None) == (wanted == "evaluation")
    assert (library.statistics is None) == (wanted == "analysis")


@pytest.mark.parametrize("name", ["layers.safetensors", "latents.parquet", "examples.parquet", "profile.safetensors"])
def test_flipped_bytes_anywhere_break_no_page(run: Path, name: str):
    path, draw = run / "analysis" / name, np.random.default_rng(1)
    whole = path.read_bytes()
    for _ in range(10):
        data = bytearray(whole)
        for at in draw.integers(0, len(data), 3):
            data[at] ^= 1 << draw.integers(8)
        path.write_bytes(data)
        library = Library.open(run)
        all_views(library)
        latent_view(library, 3, 2)
        if library.statistics is not None:
            heatmap_bytes(library)


@pytest.mark.parametrize("changes", [{"n_latents": 64}, {"layers": (0, 1, 2)}, {"layers": (1, 2, 3, 4, 5, 6)}])
def test_an_analysis_of_another_sae_is_not_shown(run: Path, tmp_path: Path, changes: dict):
    known = MLSAE.from_pretrained(run).config.to_dict() | {"expansion_factor": None, "frame": "none"} | changes
    MLSAE(MLSAEConfig(**{key: x for key, x in known.items() if x is not None})).save_pretrained(tmp_path / "other")
    library = Library.open(tmp_path / "other", analysis=run / "analysis")
    assert library.statistics is None
    assert "analysis" in what(library)
    assert not {"summary.json", "layers.safetensors"}.isdisjoint(why(library, "analysis").replace(":", "").split())
    assert library.missing("analysis")[0]["command"].endswith(f"--out '{run / 'analysis'}'")
    all_views(library)


def test_parts_of_another_analysis_are_not_shown(run: Path, tmp_path: Path):
    """Files of a smaller SAE among those of this one."""
    other = LayerStatistics(6, 64)
    other.save(run / "analysis" / "layers.safetensors")
    assert "layers.safetensors" in why(Library.open(run), "analysis")
    for sums in ("totals", "counts"):
        mine = LayerStatistics(6, 128)
        mine.by_shard[sums][:] = -1
        mine.save(run / "analysis" / "layers.safetensors")
        library = Library.open(run)
        all_views(library)
        assert (library.statistics is None) == (sums == "totals")
    mine.by_shard["totals"][:] = torch.nan
    mine.save(run / "analysis" / "layers.safetensors")
    assert "layers.safetensors" in why(Library.open(run), "analysis")


def test_tokens_without_their_tokenizer_are_numbers(run: Path):
    library = Library.open(run, lm=str(run / "no model"))
    page = latent_view(library, int(library.statistics.ordered.latent[5]))
    assert all(token.startswith("#") for at in page["examples"] for ex in at["top"] for token in ex["tokens"])
    assert page["examples"]
    assert "Tokens are shown as numbers" in why(library, "tokenizer")
    found = search_view(library, SearchRequest(token="#"))
    assert found["total"] > 0
    assert "tokenizer" in {item["what"] for item in found["missing"]}


def test_another_tokenizer_is_not_taken_for_the_saes(run: Path, tmp_path: Path):
    from tiny import save_tiny_lm

    other = save_tiny_lm(tmp_path / "other-lm", n_layers=6, bos=True)
    library = Library.open(run, lm=str(other))
    with pytest.raises(ModelError, match="another tokenizer"):
        library.load_tokenizer()
    assert Library.open(run).load_tokenizer() is not None


def test_ids_that_the_tokenizer_does_not_have_are_numbers(run: Path):
    first, *others = Library.open(run).strings([65, -1, 10**6, 2**40])
    assert first == Library.open(run).load_tokenizer().strings([65])[0]
    assert others == ["#-1", "#1000000", f"#{2**40}"]


def test_a_damaged_sae_is_said_and_what_needs_none_is_shown(run: Path):
    path = run / "sae" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 64
    path.write_bytes(data)
    library = Library.open(run)
    for _ in range(2):
        with pytest.raises(ModelError):
            neighbours_view(library, 3)
    assert what(library) >= {"sae"}
    assert "NaN" in why(library, "sae") or "fingerprint" in why(library, "sae") or "saved" in why(library, "sae")
    assert all_views(library)["latent"]["summary"] is not None


def test_an_sae_saved_anew_is_said(run: Path):
    library = Library.open(run)
    assert (library.sae is not None, library.missing("sae")) == (True, [])
    path = run / "sae" / "model.safetensors"
    files.write_bytes(path, path.read_bytes())
    assert "saved anew" in why(library, "sae")


def test_warming_reads_what_pages_need(run: Path):
    library = Library.open(run)
    library.warm()
    assert library._sae is not None
    assert library._table._value is not None
    (run / "sae" / "model.safetensors").write_bytes(b"")
    Library.open(run).warm()
