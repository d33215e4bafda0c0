"""Files for Neuronpedia: a feature for every latent and layer, every example, and the numbers of the analysis."""

import gzip
import json
import shutil
from collections import Counter

import pytest
import torch

from mlsae.analysis.example_file import read_all
from mlsae.analysis.layers import LayerStatistics
from mlsae.analysis.vocabulary import logit_lens
from mlsae.analyze import analyze
from mlsae.cli import main
from mlsae.data import pack
from mlsae.downstream import neuronpedia
from mlsae.downstream.neuronpedia import Names
from mlsae.errors import ConfigError, ModelError, ResourceError
from mlsae.frames import Lens
from mlsae.lm import LanguageModel
from mlsae.text import TextSource
from test_sae import make_sae
from tiny import byte_tokenizer, tiny_hf_model

NAMES = Names(creator_id="c1", creator="Ada", release="first", source_set="res-40", model="tiny")
FEATURE = """modelId layer index creatorId createdAt maxActApprox hasVector vector vectorLabel vectorDefaultSteerStrength hookName
topkCosSimIndices topkCosSimValues neuron_alignment_indices neuron_alignment_values neuron_alignment_l1
correlated_neurons_indices correlated_neurons_pearson correlated_neurons_l1 correlated_features_indices
correlated_features_pearson correlated_features_l1 neg_str neg_values pos_str pos_values frac_nonzero
freq_hist_data_bar_heights freq_hist_data_bar_values logits_hist_data_bar_heights logits_hist_data_bar_values
decoder_weights_dist sourceSetName"""
ACTIVATION = """id tokens index layer modelId maxValue maxValueTokenIndex minValue values creatorId dataSource dataIndex dfaValues
dfaTargetIndex dfaMaxValue createdAt lossValues logitContributions binMin binMax binContains qualifyingTokenIndex
zIndices zValues"""
"""Their fields in Neuronpedia's db_models."""


def sae_of(**changes):
    sae = make_sae(**{"layers": (0, 2), "d_model": 32, "n_latents": 40, "k": 5, **changes})
    sae.norm_limit.fill_(torch.inf)
    if sae.lens is not None:
        lens = Lens(sae.layers, 32)
        lens.weight, lens.bias = torch.randn(2, 32, 32) / 100, torch.randn(2, 32)
        sae.set_lens(lens)
    return sae


@pytest.fixture(scope="module")
def blocks(lm, corpus):
    return pack(TextSource(str(corpus), "test"), lm.tokenizer, 16, progress=False)


@pytest.fixture(scope="module")
def analysis(lm, blocks, tmp_path_factory):
    """Of `sae_of()`."""
    return analyzed(sae_of(), lm, blocks, tmp_path_factory.mktemp("analysis"))


def analyzed(sae, lm, blocks, folder):
    found = analyze(sae, lm, blocks, prompt="Mary", nulls=False, directions=False, examples=6, progress=False)
    found.save(folder)
    return folder


@pytest.fixture(scope="module")
def out(lm, analysis, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "np"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neuronpedia, "LATENTS_A_FILE", 16)
        done = neuronpedia.write_export(sae_of(), lm, analysis, out, NAMES, data="texts", progress=False)
    assert done.sources == ["tiny/0-res-40", "tiny/2-res-40"]
    assert done.n_features == 80
    assert done.n_activations == len(rows(out, 0, "activations")) + len(rows(out, 2, "activations"))
    return out


def rows(out, layer, kind):
    paths = sorted((out / "tiny" / f"{layer}-res-40" / kind).iterdir())
    return [json.loads(line) for path in paths for line in gzip.open(path, "rt", encoding="utf-8")]


def test_every_line_has_the_keys_of_its_class(out):
    for layer in (0, 2):
        assert all(row.keys() == set(FEATURE.split()) for row in rows(out, layer, "features"))
        assert all(row.keys() == set(ACTIVATION.split()) for row in rows(out, layer, "activations"))
        folder = out / "tiny" / f"{layer}-res-40"
        assert sorted(path.name for path in (folder / "features").iterdir()) == [
            f"batch-{i}.jsonl.gz" for i in range(3)
        ]
        said = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.jsonl")}
        assert said.keys() == {"release", "model", "sourceset", "source"}
        assert {row["creatorId"] for row in said.values()} == {"c1"}
        assert (said["release"]["name"], said["release"]["creatorName"]) == ("first", "Ada")
        assert (said["source"]["id"], said["source"]["setName"]) == (f"{layer}-res-40", said["sourceset"]["name"])
        assert (said["source"]["dataset"], said["source"]["num_tokens_in_prompt"]) == ("texts", 16)
        assert said["sourceset"]["releaseName"] == "first"
        assert said["model"]["id"] == said["source"]["modelId"] == "tiny"


def test_a_feature_is_a_latent_at_a_layer(out, analysis):
    counts, n_tokens = (found := LayerStatistics.load(analysis / "layers.safetensors")).counts, found.n_tokens
    for row, layer in enumerate((0, 2)):
        features = rows(out, layer, "features")
        assert [feature["index"] for feature in features] == [str(latent) for latent in range(40)]
        assert {feature["layer"] for feature in features} == {f"{layer}-res-40"}
        assert [feature["frac_nonzero"] * n_tokens for feature in features] == pytest.approx(counts[row].tolist())
        assert any(feature["frac_nonzero"] for feature in features)
        for feature, count in zip(features, counts[row].tolist(), strict=True):
            assert sum(feature["freq_hist_data_bar_heights"]) == pytest.approx(count)
            assert len(feature["freq_hist_data_bar_values"]) == len(feature["freq_hist_data_bar_heights"])


@torch.no_grad()
@pytest.mark.parametrize("kind", [{"frame": "layer"}, {"frame": "none"}, {"frame": "layer", "lens": "somewhere"}])
def test_a_vector_is_what_one_unit_of_the_latent_adds(lm, blocks, tmp_path, kind):
    sae = sae_of(**kind)
    folder = analyzed(sae, lm, blocks, tmp_path / "analysis")
    neuronpedia.write_export(sae, lm, folder, tmp_path / "out", NAMES, progress=False)
    code = sae.encode(torch.randn(2, 40, 32))
    nothing = type(code)(**{**vars(code), "values": torch.zeros_like(code.values)})
    one = type(code)(
        **{**vars(nothing), "values": torch.ones(2, 40, 1), "indices": torch.arange(40).expand(2, 40)[..., None]}
    )
    adds = sae.decode(one) - sae.decode(nothing)
    for row, layer in enumerate((0, 2)):
        vectors = torch.tensor([feature["vector"] for feature in rows(tmp_path / "out", layer, "features")])
        torch.testing.assert_close(vectors, adds[row], rtol=1e-4, atol=1e-5)


def test_activations_are_the_examples(out, analysis, lm):
    examples = [example for part in read_all(analysis / "examples.parquet") for example in part]
    for layer in (0, 2):
        here = [example for example in examples if example.layer == layer]
        found = rows(out, layer, "activations")
        assert [row["index"] for row in found] == [str(example.latent) for example in here]
        for row, example in zip(found, here, strict=True):
            assert row["values"] == example.activations
            assert row["tokens"] == lm.tokenizer.strings(example.tokens)
            assert row["values"][row["qualifyingTokenIndex"]] == example.value
            assert row["maxValue"] == max(row["values"]) == row["values"][row["maxValueTokenIndex"]]
            assert row["minValue"] == min(row["values"])
            assert len(row["tokens"]) == len(row["values"])
    assert max(Counter(row["id"] for layer in (0, 2) for row in rows(out, layer, "activations")).values()) == 1


def test_the_sample_stands_in_intervals_and_the_strongest_in_none(out, analysis):
    examples = [example for part in read_all(analysis / "examples.parquet") for example in part if example.layer == 2]
    features = {row["index"]: row for row in rows(out, 2, "features")}
    shares: Counter[str] = Counter()
    for row, example in zip(rows(out, 2, "activations"), examples, strict=True):
        if example.kind == "top":
            assert (row["binMin"], row["binContains"]) == (-1, -1)
            assert row["binMax"] == features[row["index"]]["maxActApprox"] >= example.value
        else:
            assert row["binMin"] <= example.value <= row["binMax"]
            alike = [
                e for e in examples if (e.latent, e.kind, e.quantile) == (example.latent, "sampled", example.quantile)
            ]
            shares[row["index"]] += row["binContains"] / len(alike)
    assert shares
    for latent, share in shares.items():
        assert share == pytest.approx(features[latent]["frac_nonzero"])


def test_words_are_those_of_the_logit_lens(out, lm):
    def logits(rows):
        return lm.logits_along(rows)[:, : len(lm.tokenizer.hf)]

    want = logit_lens(sae_of().W_dec.detach(), logits, top=10)
    for latent, feature in enumerate(rows(out, 0, "features")):
        assert feature["pos_str"] == lm.tokenizer.strings(want.promoted[latent].tolist())
        assert feature["neg_values"] == pytest.approx(want.suppressed_logits[latent].tolist(), abs=1e-5)
        assert sum(feature["logits_hist_data_bar_heights"]) == len(lm.tokenizer.hf)
        width = feature["logits_hist_data_bar_values"][1] - feature["logits_hist_data_bar_values"][0]
        assert feature["pos_values"][0] == pytest.approx(
            feature["logits_hist_data_bar_values"][-1] + width / 2, rel=1e-4
        )
        assert feature["neg_values"][0] == pytest.approx(
            feature["logits_hist_data_bar_values"][0] - width / 2, rel=1e-4
        )
        assert feature["logits_hist_data_bar_heights"][0] > 0
        assert feature["logits_hist_data_bar_heights"][-1] > 0


def test_a_latent_is_a_feature_of_its_own_layers_alone(lm, blocks, tmp_path):
    """With a dictionary for each layer: under its own number."""
    sae = sae_of(groups=2, n_latents=80)
    folder = analyzed(sae, lm, blocks, tmp_path / "analysis")
    done = neuronpedia.write_export(sae, lm, folder, tmp_path / "out", NAMES, progress=False)
    assert done.n_features == 80
    assert [int(row["index"]) for row in rows(tmp_path / "out", 0, "features")] == [*range(40)]
    assert [int(row["index"]) for row in rows(tmp_path / "out", 2, "features")] == [*range(40, 80)]
    vectors = torch.tensor([row["vector"] for row in rows(tmp_path / "out", 2, "features")])
    torch.testing.assert_close(vectors, sae.W_dec.detach()[40:] * sae.frame.scale[1])


def test_a_token_keeps_the_space_before_it():
    """Decoding one alone loses that of sentencepiece; every byte of it is one token here."""
    lm = LanguageModel(tiny_hf_model(), byte_tokenizer(), name="tiny")
    strings = neuronpedia._Strings(lm)
    lm.tokenizer.pieces = lambda ids: ["▁they"]  # ty: ignore[invalid-assignment]
    lm.tokenizer.strings = lambda ids: ["they"]  # ty: ignore[invalid-assignment]
    assert strings[7] == " they"


def test_an_analysis_of_something_else_is_refused(lm, blocks, analysis, tmp_path):
    def export(sae, folder, **more):
        neuronpedia.write_export(sae, lm, folder, tmp_path / "out", NAMES, progress=False, **more)

    with pytest.raises(ModelError, match="is of another SAE"):
        export(sae_of(n_latents=48), analysis)
    with pytest.raises(ModelError, match="no such file; `mlsae analyze` writes it"):
        export(sae_of(), tmp_path)
    with pytest.raises(ConfigError, match="layers: 1 was not trained on"):
        export(sae_of(), analysis, layers=[1])
    mixed = shutil.copytree(analysis, tmp_path / "mixed")
    shutil.copy(
        analyzed(sae_of(n_latents=48), lm, blocks, tmp_path / "other") / "examples.parquet", mixed / "examples.parquet"
    )
    with pytest.raises(ModelError, match="holds examples of another SAE or tokenizer"):
        export(sae_of(), mixed)
    with pytest.raises(ResourceError, match="is there and not empty"):
        neuronpedia.write_export(sae_of(), lm, analysis, mixed, NAMES, progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("field", "value"), [("release", "../up"), ("source_set", ""), ("model", "a/b"), ("creator_id", "")]
)
def test_names_that_lead_elsewhere_are_refused(field, value):
    with pytest.raises(ConfigError, match=f"^{field}: "):
        Names(**{**vars(NAMES), field: value})


def test_the_command_takes_the_runs_own_analysis(trained, tmp_path, capsys):
    run = shutil.copytree(trained, tmp_path / "run")
    line = ["export", str(run), "--to", "neuronpedia", "--out", str(tmp_path / "out"), "--layers", "1", "--quiet"]
    assert main(line) == 2
    assert "creator_id: missing; give --creator-id" in capsys.readouterr().err
    assert main([*line, "--creator-id", "c1"]) == 6
    assert "`mlsae analyze` writes it" in capsys.readouterr().err
    assert main(["analyze", str(run), "--no-nulls", "--no-directions", "--examples", "2", "--quiet"]) == 0
    assert main([*line, "--creator-id", "c1"]) == 0
    assert [path.name for path in (tmp_path / "out" / "tiny-llama").iterdir()] == ["1-mlsae-res"]
