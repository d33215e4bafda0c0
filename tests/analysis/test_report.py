"""The report: self-contained, escaped, true to its numbers, and content with whatever was measured."""

import base64
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from test_figures import make_analysis, make_evaluation, make_metrics, words_of

from mlsae.analysis import drawing, figures, picture, report, wording
from mlsae.analysis.figures import pictures
from mlsae.analysis.layers import LayerStatistics
from mlsae.evaluate import Evaluation

torch.set_num_threads(1)

HOSTILE = "<script>alert(1)</script>"
RUN: dict[str, Any] = {
    "lm": "org/lm", "data": "text folder", "layers": [0, 1, 2, 3, 4], "n_latents": 40, "k": 4, "frame": "layer",
    "recipe": "standard", "mask_special_tokens": True, "mask_first_position": True, "mask_norm_factor": 10.0,
    "steps": 77, "directory": "runs/a", "tokens": 12345, "passes": 1.5, "seconds": 3725.0, "log_to": None,
    "masked_by_norm": [0, 2, 0, 1, 0],
}  # fmt: skip


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No images, and no files beside the report: they take most of the time, and most tests read words."""
    monkeypatch.setattr(report, "rendered", lambda figure, kind: kind.encode())
    monkeypatch.setattr(report, "save", lambda picture, directory: [])


def write(tmp_path: Path, **changes: Any) -> str:
    """The HTML of a whole report with some of its parts changed."""
    parts = {"run": RUN, "evaluation": make_evaluation(), "analysis": make_analysis(), "metrics": make_metrics()}
    paths = report.write_report(tmp_path / "report.html", **{"title": "A report", **parts, **changes})
    assert paths[0] == tmp_path / "report.html"
    assert all(path.is_file() for path in paths)
    return paths[0].read_text()


def words(html: str) -> str:
    """What a reader sees, in one line."""
    visible = re.sub(r"<style>.*?</style>|<[^>]*>", " ", html, flags=re.DOTALL)
    return re.sub(r"\s+", " ", visible)


class Tags(HTMLParser):
    """Every tag with its attributes, and those left open."""

    def __init__(self, html: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_report_holds_every_figure_and_nothing_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(picture, "rendered", lambda figure, kind: kind.encode())  # the files beside it
    monkeypatch.setitem(drawing.STYLE, "savefig.dpi", 40)  # fast
    html = write(tmp_path)
    tags = Tags(html)
    assert tags.open == []
    images = [attributes["src"] for tag, attributes in tags.found if tag == "img"]
    drawn = pictures(make_analysis(), make_evaluation(), make_metrics())
    assert len(images) == len(drawn) == 13
    assert re.findall(r'figure id="(\w+)"', html) == [picture.name for picture in drawn]
    assert all(re.match(r"data:image/(png|svg\+xml);base64,", image or "") for image in images)
    assert base64.b64decode((images[0] or "").split(",")[1]).startswith(b"<?xml")
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in tags.found}
    assert "http" not in re.sub(r"base64,[^\"]*", "", html)
    assert all((a["href"] or "").startswith("#") for _, a in tags.found if "href" in a)
    targets = {(attributes["href"] or "")[1:] for _, attributes in tags.found if "href" in attributes}
    assert targets <= {attributes["id"] for _, attributes in tags.found if "id" in attributes}
    assert len(html) < 4e6
    assert "prefers-color-scheme: dark" in html
    assert len(list((tmp_path / "figures").glob("*.png"))) == 13


@pytest.mark.usefixtures("quick")
def test_sentences_come_from_the_numbers(tmp_path: Path):
    analysis, evaluation = make_analysis(), make_evaluation()
    text = words(write(tmp_path))
    summary = analysis.summary()
    single = summary["events"]["at_one_layer"]
    effective = summary["distribution"]["effective_layers"]["mean"]
    assert f"{wording.percent(single)} of events" in text
    assert f"spreads over {wording.number(effective)} effective layers" in text
    assert "39 of 40 latents were active in 60 tokens" in text
    assert "cross-entropy of 3.50 nats" in text
    assert "all layers replaced in one pass change it by +0.750" in text
    assert f"least at layer 0 ({wording.number(evaluation['layers'][0]['fvu'])})" in text
    assert "published definition (lawson2024)" in text
    assert "1 h 2 min" in text
    assert "12,345" in text
    assert "3 vectors, at most 2 at one layer" in text
    assert "mlsae evaluate runs/a" in text
    assert "--data &#39;text folder&#39;" in text  # quoted for the shell, escaped for the page


@pytest.mark.usefixtures("quick")
def test_hostile_text_is_escaped(tmp_path: Path):
    analysis = replace(make_analysis(tokens=("<s>", HOSTILE, "</p>&$")), words=words_of(40, HOSTILE))
    run = {**RUN, "lm": HOSTILE, "data": HOSTILE, HOSTILE: HOSTILE}
    html = write(tmp_path, title=HOSTILE, notes=[HOSTILE], analysis=analysis, run=run)
    assert "<script" not in html
    assert html.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 8
    assert Tags(html).open == []


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "changes",
    [
        {"run": None},
        {"run": {"lm": "org/lm", "fvu": float("nan")}},
        {"evaluation": None},
        {"evaluation": make_evaluation(spliced=False)},
        {"evaluation": json.loads(json.dumps({**make_evaluation(), "clean_ce": None, "dead_fraction": None}))},
        {"metrics": []},
        {"run": None, "evaluation": None, "metrics": []},
        {"analysis": make_analysis(n_layers=1), "evaluation": make_evaluation(1), "run": None},
        {"analysis": replace(make_analysis(), statistics=LayerStatistics(5, 40))},
    ],
)
def test_missing_pieces_are_left_out(tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    if "analysis" not in changes:  # its pictures take most of the time
        monkeypatch.setattr(figures, "FIGURES", ())
    html = write(tmp_path, **changes)
    assert Tags(html).open == []
    assert re.findall(r"\b(nan|None|null|inf|Undefined)\b", words(html), flags=re.IGNORECASE) == []
    assert ("How good it is" in html) == (changes.get("evaluation", 1) is not None)
    assert ('id="training"' in html) == (changes.get("metrics", 1) != [])
    if changes.get("evaluation") == make_evaluation(spliced=False):
        assert "ΔCE" not in html


@pytest.mark.usefixtures("quick")
def test_an_evaluation_object_reads_like_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(figures, "FIGURES", ())
    ends = {
        "layers": [{"fvu": (0.09, 0.2)}] * 5,
        "mean": {"fvu": (0.11, 0.13)},
        "all_layers": {},
        "clean_ce": (3.4, 3.6),
    }
    evaluation = Evaluation(**make_evaluation(), ci95=ends)
    read = json.loads(json.dumps(evaluation.to_dict()))
    assert write(tmp_path / "a", evaluation=evaluation) == write(tmp_path / "b", evaluation=read)
    assert "leaves 0.120 [0.110, 0.130] of the variance" in words((tmp_path / "a" / "report.html").read_text())


def test_headlines_stand_with_their_intervals_beside_the_nulls():
    analysis = make_analysis()
    summary, drawn = analysis.summary(), {found.name: found for found in pictures(analysis)}
    head, *rows = report.headline_table(analysis, drawn)
    assert head[2:] == ["independent layers", "shuffled layers"]
    assert {len(row) for row in rows} == {4}
    found = {label: cells for label, *cells in rows}
    everywhere = [summary, *summary["nulls"].values()]
    assert found["Layers per event, mean"] == [wording.number(s["events"]["mean_active_layers"]) for s in everywhere]
    assert "[" in found["Layers per event, mean"][0]
    assert found["rel_t as published (lawson2024)"] == [wording.number(s["lawson2024"]["rel_t"]) for s in everywhere]
    shares = drawn["variance"].data["shares"]["mass"]
    assert found["… between latents"][0] == wording.percent(shares["latent"])
    assert [len(row) for row in report.headline_table(replace(analysis, nulls={}), drawn)] == [2] * (1 + len(rows))
    flat = report.headline_table(make_analysis(n_layers=1), {})
    assert [row[0] for row in flat[1:]] == ["Layers per event, mean", "Effective layers of a latent, mean"]


def test_the_sample_is_of_active_latents_in_order_of_depth():
    analysis = make_analysis()
    found, n_events = analysis.statistics.distribution(), analysis.statistics.n_events
    head, *rows = report.sample(analysis)
    latents = [int(row[0]) for row in rows]
    assert len(set(latents)) == report.N_SAMPLED
    assert (found.centre_of_mass[latents].diff() >= 0).all()
    assert (n_events[latents] >= n_events[found.used].median()).all()
    assert head[-1] == "promotes"
    assert {row[-1] for row in rows} == {"“ the” “\n”"}
    shifted = replace(analysis, layers=(10, 12, 14, 16, 18), words=None)
    for row, moved in zip(rows, report.sample(shifted)[1:], strict=True):  # depth is named by the model's layers
        before, after = (float(cells[1].split(" ")[0]) for cells in (row, moved))
        assert after == pytest.approx(10 + 2 * before, abs=0.06)
    assert report.sample(replace(analysis, statistics=LayerStatistics(5, 40))) == []


def test_what_latents_promote_stands_beside_what_random_directions_do(tmp_path: Path, quick: None):
    analysis = make_analysis()
    logits = analysis.summary()["directions"]["logits"]
    here, *chance = (wording.number(x["mean"]) for x in (logits["max_logit"], *logits["chance"].values()))
    shown = words(write(tmp_path))
    assert f"the first of them by {here} on average over all latents" in shown
    assert f"by chance it is {chance[0]} (uniform directions) or {chance[1]} (random ones" in shown
    assert "by chance it is" not in words(write(tmp_path, analysis=replace(analysis, words=None)))


# ---- the terminal's table ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_layers", [1, 5, 12])
def test_plain_table_lists_every_layer(n_layers: int):
    lines = report.plain_table(make_evaluation(n_layers)).splitlines()
    assert [line.split()[0] for line in lines] == ["layer", *map(str, range(n_layers)), "mean", "all"]
    assert lines[0].split()[1:] == ["FVU", "cosine", "L0", "ΔCE", "KL"]
    assert lines[-1].split()[1:] == ["0.750", "0.875"]
    assert len({len(line) for line in lines}) == 1


def test_plain_table_thins_many_layers_evenly():
    lines = report.plain_table(make_evaluation(30)).splitlines()
    layers = [int(line.split()[0]) for line in lines[1:13]]
    assert (layers[0], layers[-1]) == (0, 29)
    assert {b - a for a, b in pairwise(layers)} <= {2, 3}
    assert lines[-1] == "(12 of 30 layers shown; the mean is over all of them)"


def test_plain_table_without_splice():
    lines = report.plain_table(make_evaluation(spliced=False)).splitlines()
    assert lines[0].split() == ["layer", "FVU", "cosine", "L0"]
    assert lines[-1].split()[0] == "mean"


# ---- numbers in words ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.27421, "0.274"), (4.717, "4.72"), (19880, "19,880"), (1234.5, "1,234"), (-0.0691, "−0.0691"), (0.0, "0"),
        (2.5e-5, "2.50e−05"), (float("nan"), "–"), (float("inf"), "–"), (None, "–"), (32.0, "32"),
        ({"value": 0.5, "ci95": [0.4, 0.65]}, "0.500 [0.400, 0.650]"), ({"value": 0.5, "ci95": [None, None]}, "0.500"),
        ({"value": 0.5, "ci95": [float("nan")] * 2}, "0.500"),
    ],
)  # fmt: skip
def test_numbers(value: Any, text: str):
    assert wording.number(value) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0, "0 %"), (1, "100 %"), (0.753, "75 %"), (0.0344, "3.4 %"), (0.994, "99.4 %"), (1e-6, "< 0.01 %"),
        (0.99999, "> 99.9 %"), (float("nan"), "–"), (None, "–"), (0.0997, "10 %"),
        ({"value": 0.5, "ci95": [-0.012, 0.65]}, "50 % [−1.2 %, 65 %]"),
    ],
)  # fmt: skip
def test_percentages(share: float | None, text: str):
    assert wording.percent(share) == text


def test_durations_and_signs():
    assert [wording.duration(s) for s in (3.25, 71, 3725)] == ["3.2 s", "1 min 11 s", "1 h 2 min"]
    assert [wording.signed(x) for x in (0.5, -0.5, 0, None)] == ["+0.500", "−0.500", "0", "–"]
