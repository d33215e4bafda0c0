"""SAEs on the Hub: what is read, what is written, what is refused. hubserver.py stands in for it, in this process."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants, file_download
from huggingface_hub.utils import _http

from hubserver import HubServer, Repository, Request
from mlsae import downloads, files, formats
from mlsae.card import UNNAMED, Record, model_card
from mlsae.cli import main
from mlsae.config import MLSAEConfig
from mlsae.errors import ConfigError, ModelError
from mlsae.publish import Push, public_config
from mlsae.sae import MLSAE

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub, of its own client
TOKEN = "hf_canaryCanaryCanaryCanaryCanary1"
"""An access token that must turn up nowhere."""


def made(seed: int = 0, layers=(0, 1, 2), **knobs) -> MLSAE:
    """An SAE whose every tensor is its own, and whose language model is on the Hub."""
    torch.manual_seed(seed)
    usual = {"k": 4, "lm": "org/lm", "lm_revision": "a" * 40, "data": "org/text", "mask_norm_factor": None}
    sae = MLSAE(MLSAEConfig(d_model=16, n_latents=48, layers=layers, **{**usual, **knobs}))
    with torch.no_grad():
        for tensor in (sae.W_enc, sae.W_dec, sae.b_pre):
            tensor.normal_()
    return sae


def bits(sae: MLSAE) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in sae.state_dict().items()}


def same(one: MLSAE, other: MLSAE) -> bool:
    mine, its = bits(one), bits(other)
    return mine.keys() == its.keys() and all(torch.equal(tensor, its[name]) for name, tensor in mine.items())


class Impatient:
    """The module `time`, for a client that waits before it tries again."""

    sleep = staticmethod(lambda seconds: None)
    time, monotonic, perf_counter = time.time, time.monotonic, time.perf_counter


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A Hub that knows one user, `me`, on a machine where nothing is cached."""
    for module in (_http, file_download):
        monkeypatch.setattr(module, "time", Impatient)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("MLSAE_CACHE", str(tmp_path / "mlsae-cache"))
    with HubServer(token=TOKEN) as server:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HUB_OFFLINE": False,
            "HF_HUB_CACHE": str(tmp_path / "hub-cache"),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DISABLE_PROGRESS_BARS": True,
            "HF_HUB_DISABLE_TELEMETRY": True,
        }.items():
            monkeypatch.setattr(constants, name, value)
        yield server


def stored(hub: HubServer, name: str) -> Repository:
    return hub.repositories[f"models/{name}"]


def downloaded(hub: HubServer) -> set[str]:
    """Paths of files whose bytes were asked for."""
    return {r.path.partition("/resolve/")[2].partition("/")[2] for r in hub.requests if r.method == "GET"} - {""}


def put(hub: HubServer, name: str, folder: Path, **knobs) -> Repository:
    hub.repositories[f"models/{name}"] = Repository(folder, **knobs)
    return hub.repositories[f"models/{name}"]


# ---- there and back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frame", ["layer", "vector", "none"])
def test_what_was_pushed_is_what_is_loaded(hub, frame):
    sae = made(frame=frame)
    done = sae.push_to_hub("me/sae")
    again = MLSAE.from_pretrained("me/sae")
    assert same(sae, again)
    assert again.config == sae.config
    assert done.commit == stored(hub, "me/sae").commit
    assert stored(hub, "me/sae").access == "public"


FORMATS = {"lawson2024": "vector", "saelens": "vector", "sparsify": "none"}


@pytest.mark.parametrize("to", FORMATS)
def test_an_sae_pushed_in_the_format_of_another_library_computes_the_same(hub, to):
    """Its card says how to load it, and no layer is missing."""
    sae = made(frame=FORMATS[to])
    done = sae.push_to_hub("me/sae", to=to)
    again = MLSAE.from_pretrained("me/sae", layers=(0, 1, 2) if to == "lawson2024" else None)
    assert again.layers == (0, 1, 2)
    resid = 3 * torch.randn(3, 5, 16)
    torch.testing.assert_close(again.encode(resid).to_dense(), sae.encode(resid).to_dense())
    assert f"`{to}`" in done.card


def test_a_pickle_is_downloaded_only_when_it_is_trusted(hub):
    sae = made(frame="vector")
    card = sae.push_to_hub("me/sae", to="openai").card
    assert 'from_pretrained("me/sae", allow_pickle=True)' in card
    with pytest.raises(ModelError, match=r"'me/sae' is in a pickle \(resid_post_mlp.*0.pt\).*allow_pickle=True"):
        MLSAE.from_pretrained("me/sae")
    assert downloaded(hub) == set()
    assert torch.equal(MLSAE.from_pretrained("me/sae", allow_pickle=True).W_enc, sae.W_enc)


def test_every_push_is_a_commit_that_can_be_named(hub):
    first, second = made(1), made(2)
    commits = [sae.push_to_hub("me/sae").commit for sae in (first, second)]
    branch = made(3).push_to_hub("me/sae", revision="wide")
    assert same(MLSAE.from_pretrained("me/sae"), second)
    assert same(MLSAE.from_pretrained("me/sae", revision=commits[0]), first)
    assert same(MLSAE.from_pretrained("me/sae", revision="wide"), made(3))
    assert stored(hub, "me/sae").branches == {"main": commits[1], "wide": branch.commit}
    with pytest.raises(ModelError, match="'me/sae' has no revision 'v9'; name a branch, tag or commit"):
        MLSAE.from_pretrained("me/sae", revision="v9")
    with pytest.raises(ModelError, match="is no revision"):
        MLSAE.from_pretrained("me/sae", revision="../main")


def test_the_same_sae_twice_is_one_commit(hub):
    first = made().push_to_hub("me/sae").commit
    assert made().push_to_hub("me/sae").commit == first


# ---- what is downloaded ----------------------------------------------------------------------------------------------


@pytest.fixture
def tree(hub, tmp_path) -> MLSAE:
    """`me/tree`: a folder for each layer, beside much that no SAE needs."""
    sae = made(frame="none", groups=3)
    formats.write(sae.weights(), tmp_path / "tree", "sparsify")
    (tmp_path / "tree" / "config.json").write_text(json.dumps({"sae": {}, "model": "org/lm"}))
    for beside in ("optimizer.pt", "layers.0/state.safetensors", "notes.txt"):
        (tmp_path / "tree" / beside).write_bytes(b"much")
    put(hub, "me/tree", tmp_path / "tree")
    return sae


def test_a_tree_of_saes_is_read_whole_or_by_folder_and_nothing_else_of_it(hub, tree):
    one = MLSAE.from_pretrained("me/tree/layers.1")
    wanted = {f"layers.1/{name}" for name in ("cfg.json", "sae.safetensors")} | {"config.json"}
    assert downloaded(hub) == wanted
    assert (one.layers, one.config.lm) == ((1,), "org/lm")
    assert torch.equal(one.W_dec, tree.W_dec[16:32])
    assert same(MLSAE.from_pretrained("me/tree"), tree)
    rest = {f"layers.{i}/sae.safetensors" for i in (0, 2)}
    assert downloaded(hub) == wanted | rest  # every cfg.json is the same bytes, which are cached by now


ABSENT = {
    "me/tree/layer.1": "'me/tree' has no 'layer.1'; did you mean 'layers.1'?",
    "me/tree/wide": "'me/tree' has no 'wide'; look at its files",
    "me/nothing": "'me/nothing' not found on the Hub or as a folder; check the name, or run 'hf auth login'",
    "me/tree/../../x": "'me/tree/../../x' not found on the Hub or as a folder; check the name",
    "/no/such/folder": "'/no/such/folder' not found on the Hub or as a folder; check the name",
    "me/empty": r"'me/empty' holds no SAE of a known format",
}


@pytest.mark.parametrize("name", ABSENT)
def test_what_is_not_there_is_named_and_nothing_is_downloaded(hub, tree, tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    put(hub, "me/empty", tmp_path / "empty")
    with pytest.raises(ModelError) as refused:
        MLSAE.from_pretrained(name)
    assert ABSENT[name] in str(refused.value)
    assert downloaded(hub) == set()


def test_without_a_network_what_was_downloaded_is_used(hub, tree, monkeypatch):
    """And no more of a repository than that: half a tree is not the tree."""
    MLSAE.from_pretrained("me/tree/layers.1")
    commit = stored(hub, "me/tree").commit
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for revision in (None, "main", commit):
        assert MLSAE.from_pretrained("me/tree/layers.1", revision=revision).layers == (1,)
    for name in ("me/tree", "me/tree/layers.0", "me/other"):
        repository = "/".join(name.split("/")[:2])
        why = f"'{repository}' is not in the local cache and offline mode is on; run 'hf download {repository}'"
        with pytest.raises(ModelError, match=why):
            MLSAE.from_pretrained(name)
    assert hub.requests == []


@pytest.mark.parametrize("fault", [429, 500, 503, "close"])
def test_a_hub_that_cannot_be_reached_is_said_and_the_cache_serves(hub, tree, caplog, fault):
    sae = MLSAE.from_pretrained("me/tree")
    hub.faults = lambda request: fault
    assert same(MLSAE.from_pretrained("me/tree"), sae)
    assert [r.getMessage() for r in caplog.records if "'me/tree' is the copy in the cache" in r.getMessage()]


def test_a_download_that_is_cut_goes_on_where_it_stopped(hub, monkeypatch):
    """Within one call by a request for the rest; after a call that failed, with the files that are whole."""
    sae = made()
    sae.push_to_hub("me/sae")
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 64)
    cut = []

    def once(request: Request):
        whole = "range" not in request.headers
        if request.method == "GET" and request.path.endswith("/model.safetensors") and whole and not cut:
            cut.append(request.path)
            return "short"
        return None

    hub.faults = once
    assert same(MLSAE.from_pretrained("me/sae"), sae)
    (rest,) = [r.headers["range"] for r in hub.requests if "range" in r.headers and r.method == "GET"]
    size = len(stored(hub, "me/sae").files["model.safetensors"])
    assert size // 2 - 64 <= int(rest.removeprefix("bytes=").rstrip("-")) <= size // 2


def test_a_large_download_is_told_of_before_it_begins(hub, tree, caplog, monkeypatch):
    monkeypatch.setattr(downloads, "LARGE_DOWNLOAD", 1000)
    MLSAE.from_pretrained("me/tree")
    MLSAE.from_pretrained("me/tree")
    assert sum("GB to download" in record.getMessage() for record in caplog.records) == 1


# ---- what the Hub refuses --------------------------------------------------------------------------------------------


def said(capsys, arguments: list[str], code: int) -> str:
    assert main(arguments) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert TOKEN not in shown.err
    return shown.err.strip().splitlines()[-1].removeprefix("error: ")


UNKNOWN = "'me/sae' not found on the Hub or as a folder; check the name, or run 'hf auth login' if it is private"
CLOSED = "the Hub does not let your token read 'me/sae'; run 'hf auth login'"
READING = {
    ("gated", None): "'me/sae' is gated; ask for access on huggingface.co/me/sae and run 'hf auth login'",
    ("private", None): UNKNOWN,
    **{("public", status): CLOSED for status in (401, 403)},
    **{
        ("public", fault): "'me/sae' is not in the local cache and the Hub cannot be reached ("
        for fault in (404, 429, 500, "close")
    },
}


@pytest.mark.parametrize(("access", "fault"), READING)
def test_an_sae_that_the_hub_does_not_give_is_one_sentence(hub, tmp_path, capsys, access, fault):
    made().save_pretrained(tmp_path / "sae")
    put(hub, "me/sae", tmp_path / "sae", access=access)
    hub.token, hub.faults = "hf_other", lambda request: fault
    sentence = said(capsys, ["push", "me/sae", "me/copy", "--dry-run"], 6)
    assert sentence.startswith(f"sae: {READING[access, fault]}")
    assert sentence.count("; ") <= 2


@pytest.mark.parametrize("fault", [403, 404, 500, "close", "short"])
def test_a_download_that_fails_to_the_end_is_one_sentence(hub, tmp_path, capsys, fault):
    made().save_pretrained(tmp_path / "sae")
    put(hub, "me/sae", tmp_path / "sae")
    hub.faults = lambda request: fault if request.method == "GET" and "/resolve/" in request.path else None
    assert said(capsys, ["push", "me/sae", "me/copy", "--dry-run"], 6).startswith("sae: ")


FAULTS = [("repos/create", 429), ("validate-yaml", 500), ("preupload", 403), ("objects/batch", 500)]
FAULTS += [("lfs-storage", "close"), *(("/commit/", fault) for fault in (401, 403, 429, 500, "close"))]


@pytest.mark.parametrize(("part", "fault"), FAULTS)
def test_an_upload_that_fails_leaves_what_was_there(hub, tmp_path, capsys, part, fault):
    """Wherever it fails; and the next one puts it right."""
    before = made(1).push_to_hub("me/sae").commit
    made(2).save_pretrained(tmp_path / "sae")
    hub.faults = lambda request: fault if part in request.path else None
    arguments = ["push", str(tmp_path / "sae"), "me/sae"]
    sentence = said(capsys, arguments, 6)
    refused = "repo: 'me/sae': the Hub does not let you write it; run 'hf auth login'"
    assert sentence.startswith(refused if fault in (401, 403) else "repo: 'me/sae' cannot be written (")
    assert stored(hub, "me/sae").commit == before
    hub.faults = lambda request: None
    assert main(arguments) == 0
    assert same(MLSAE.from_pretrained("me/sae"), made(2))
    assert not list((tmp_path / "mlsae-cache").rglob("*.safetensors"))


REFUSED = {
    ("plain", ""): (2, "repo: 'plain' given; must be user/name"),
    ("me/a/b", ""): (2, "repo: 'me/a/b' given; must be user/name"),
    ("me/new", "--license GPL!"): (2, "license: 'GPL!' given; must be an identifier, such as mit or cc-by-4.0"),
    ("me/new", "--license gpl-99"): (6, "license: the Hub refuses the model card; give --license as the Hub spells it"),
    ("me/new", "--lm ./folder"): (2, "lm: './folder' given; must be its name on the Hub"),
    ("me/new", "--to sparsify"): (2, "to: 'sparsify'"),
    ("me/public", "--private"): (6, "repo: 'me/public' is there and public; make it private on the Hub, or leave out"),
    ("me/other", ""): (6, "repo: 'me/other' holds layers.0/sae.safetensors of another SAE"),
}


@pytest.mark.parametrize(("repo", "flags"), REFUSED)
def test_what_cannot_be_pushed_is_one_sentence_and_leaves_no_trace(hub, tree, tmp_path, capsys, repo, flags):
    made(frame="vector").save_pretrained(tmp_path / "sae")
    hub.repositories["models/me/public"] = hub.repositories["models/me/other"] = stored(hub, "me/tree")
    before = stored(hub, "me/tree").commit
    code, sentence = REFUSED[repo, flags]
    assert said(capsys, ["push", str(tmp_path / "sae"), repo, *flags.split()], code).startswith(sentence)
    assert stored(hub, "me/tree").commit == before


def test_offline_nothing_is_pushed(hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    made().save_pretrained(tmp_path / "sae")
    sentence = said(capsys, ["push", str(tmp_path / "sae"), "me/sae"], 6)
    assert sentence == "repo: 'me/sae' cannot be written: offline mode is on; push while online"
    assert hub.requests == []


def test_a_private_repository_is_private(hub):
    made().push_to_hub("me/sae", private=True)
    assert stored(hub, "me/sae").access == "private"
    made(1).push_to_hub("me/sae", private=True)
    assert same(MLSAE.from_pretrained("me/sae"), made(1))


# ---- what is uploaded ------------------------------------------------------------------------------------------------

SECTIONS = ["## How it was trained", "## How good it is", "## Use it", "## Licence", "## Citation"]


@pytest.fixture
def judged(trained, tmp_path) -> Path:
    """A run directory of a folder's language model and text, with an evaluation and a figure."""
    import shutil

    run = shutil.copytree(trained, tmp_path / "run")
    assert main(["evaluate", str(run), "--tokens", "400", "--context-length", "64", "--quiet"]) == 0
    (run / "analysis" / "figures").mkdir(parents=True)
    (run / "analysis" / "figures" / "heatmap.png").write_bytes(b"\x89PNG and so on")
    return run


def test_a_dry_run_lists_what_a_push_uploads_and_asks_nobody(hub, judged, capsys):
    capsys.readouterr()
    arguments = ["push", str(judged), "me/sae", "--license", "mit", "--json", "-"]
    assert main([*arguments, "--dry-run"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert hub.requests == []
    assert planned["commit"] is None
    assert main(arguments) == 0
    shown = capsys.readouterr()
    there = {path: len(content) for path, content in stored(hub, "me/sae").files.items() if path != ".gitattributes"}
    assert planned["files"] == there == json.loads(shown.out)["files"]
    assert set(there) == {"README.md", "config.json", "heatmap.png", "model.safetensors"}
    assert stored(hub, "me/sae").files["README.md"].decode() == planned["card"]
    assert shown.err.startswith(f"{hub.url}/me/sae/tree/main\n")
    assert all(path in shown.err for path in there)


def test_nothing_that_is_uploaded_names_a_place_on_this_machine(hub, judged, lm_folder, corpus, tmp_path):
    """Nor the token, nor the user: of a language model and text in folders, the config and card say nothing."""
    sae = MLSAE.from_pretrained(judged)
    assert Path(sae.config.lm).is_absolute()
    assert Path(sae.config.data).is_absolute()
    sae.push_to_hub("me/sae", run=judged)
    secrets = [str(tmp_path), str(lm_folder), lm_folder.name, str(corpus), str(Path.home()), os.getcwd(), TOKEN]
    for path, content in stored(hub, "me/sae").files.items():
        assert [secret for secret in secrets if secret.encode() in content] == [], path
    for request in hub.requests:
        assert [secret for secret in secrets if secret.encode() in request.body] == [], request.path
    config = json.loads(stored(hub, "me/sae").files["config.json"])
    assert (config["lm"], config["data"], config["lm_revision"]) == (None, None, None)
    assert same(MLSAE.from_pretrained("me/sae"), sae)


def test_names_on_the_hub_can_be_given_for_those_of_folders(hub, judged):
    sae = MLSAE.from_pretrained(judged)
    card = sae.push_to_hub("me/sae", lm="org/lm", data="org/text:en", dry_run=True).card
    assert "base_model: org/lm" in card
    assert "- org/text\n" in card
    assert 'LanguageModel.from_pretrained("org/lm")' in card


@pytest.mark.parametrize(
    ("name", "public"),
    [("org/lm", True), ("gpt2", True), ("/data/lm", False), ("./lm", False), ("~/lm", False), ("a/b/c", False)],
)
def test_a_name_is_published_only_if_the_hub_could_know_it(name, public):
    config = made(lm=name, lm_revision=None, data=name).config
    found = public_config(config)
    assert (found.lm, found.data) == ((name, name) if public else (None, None))


def test_a_folder_that_looks_like_a_name_on_the_hub_is_a_folder(tmp_path, monkeypatch):
    """But a language model with a commit is on the Hub, whatever lies here."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "lm").mkdir(parents=True)
    assert public_config(made(lm_revision=None, data="org/lm").config).data is None
    assert public_config(made(lm_revision=None).config).lm is None
    assert public_config(made().config).lm == "org/lm"
    assert public_config(made().config, lm="else/where").lm_revision is None
    assert public_config(made().config, lm="org/lm").lm_revision == "a" * 40
    lens = made().config.replaced(lens=str(tmp_path))
    assert public_config(lens).lens == UNNAMED


def test_the_card_has_every_section_and_the_numbers_of_the_run(judged):
    sae = MLSAE.from_pretrained(judged)
    planned: Push = sae.push_to_hub("me/name", run=judged, license="mit", dry_run=True)
    card = planned.card
    places = [card.index(section) for section in SECTIONS]
    assert places == sorted(places)
    evaluation = json.loads((judged / "evaluation.json").read_text())
    for row in evaluation["layers"]:
        assert f"| {row['layer']} | {row['fvu']['value']:.3f} [" in card
    last = json.loads((judged / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"{last['tokens']:,} tokens in {last['step']:,} steps" in card
    for said in (
        "# name\n",
        "0-2, each",
        "4 latents of each vector",
        "license: mit",
        "![",
        "2409.04185",
        "`layer`: each",
    ):
        assert said in card


def test_a_card_says_what_is_not_known(hub):
    card = made().push_to_hub("me/name", dry_run=True).card
    assert "Not measured" in card
    assert "None was chosen" in card
    assert "license:" not in card
    assert "![" not in card


def test_a_card_cannot_be_made_to_say_other_things():
    """Names come from files of others."""
    config = made(lm='a`|b"\n\n# Heading', data="a`\n# Heading").config
    record = Record(config={"split": "x\n# Heading"}, software={"torch": "2\n# Heading"})
    page = model_card(config, "me/name", record, licence=None, to="mlsae", pickled=False).partition("\n---\n")[2]
    assert "Heading" in page
    assert "\n# Heading" not in page
    assert public_config(config).lm is None


def test_the_lens_of_a_model_is_found_in_the_published_space(hub, tmp_path):
    from mlsae.lens import PUBLISHED, _find_published

    folder = tmp_path / "space" / "lens" / "org" / "lm"
    folder.mkdir(parents=True)
    for name in PUBLISHED:
        (folder / name).write_bytes(b"{}")
    hub.repositories["spaces/AlignmentResearch/tuned-lens"] = Repository(tmp_path / "space")
    assert {path.name for path in _find_published("org/lm").iterdir()} == set(PUBLISHED)
    with pytest.raises(ModelError, match="'org/other' is no folder, and AlignmentResearch/tuned-lens has no lens"):
        _find_published("org/other")
    del hub.repositories["spaces/AlignmentResearch/tuned-lens"]
    hub.faults = lambda request: 500
    assert {path.name for path in _find_published("org/lm").iterdir()} == set(PUBLISHED)


def test_a_full_disk_is_named(hub, tree, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(downloads, "snapshot_download", full)
    with pytest.raises(files.ResourceError, match="disk full"):
        MLSAE.from_pretrained("me/tree")


def test_a_push_of_weights_that_changed_since_they_were_saved_can_be_loaded(hub, tmp_path):
    sae = made()
    sae.save_pretrained(tmp_path / "sae")
    sae = MLSAE.from_pretrained(tmp_path / "sae")
    with torch.no_grad():
        sae.W_enc += 1
    sae.push_to_hub("me/sae")
    assert same(MLSAE.from_pretrained("me/sae"), sae)


def test_a_name_of_a_repository_is_checked_first(hub):
    for name in ("sae", "me/", "/sae", "me/s e", "me/..", "a/b/c"):
        with pytest.raises(ConfigError, match="must be user/name"):
            made().push_to_hub(name, dry_run=True)
