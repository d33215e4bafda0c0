"""Measure the explorer: how fast its pages are, how much memory it takes, and what it does when many ask at once.

    python benchmarks/explorer_load.py                           pages and memory of a made-up run, 196,608 latents x 28 layers
    python benchmarks/explorer_load.py --run DIR                 of this run
    python benchmarks/explorer_load.py --lm-run DIR              also prompts, steering and crowds, where a language model is

Each server is a `mlsae explore` of its own; pages are timed in a real Chromium through Playwright, if both are there
(MLSAE_CHROMIUM names it). Exits with 1 if a wrong answer was given, or a 5xx that is not 503.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import bigrun
import harness
from crowds import crowds, fuzz, long_jobs
from served import STORY, TEXTS, Row, Site, serving, texts_of

# ---- pages -----------------------------------------------------------------------------------------------------------

CLICK = """([selector, place]) => { const at = document.querySelector(selector), box = at.getBoundingClientRect();
  at.addEventListener("click", () => sessionStorage.setItem("clicked", Date.now()), { capture: true, once: true });
  return [box.x + place[0] * box.width, box.y + place[1] * box.height]; }"""
"""The place to click on, which will note when it was."""
DRAWN = """(selector) => new Promise((done) => { const look = () => requestAnimationFrame(() =>
  document.querySelector(selector) ? setTimeout(() => done(Date.now())) : look()); look(); })"""
"""When the first frame with such an element was on the screen: what a frame asks for is done before it, a timeout after."""
LATENT_DRAWN = "html[data-ready] .chart svg"


def pages(site: Site, rounds: int) -> Iterator[Row]:
    """In a browser: the first page from navigation to the frame in which it is ready, and clicks to that in which it is drawn."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise harness.Absent("pip install playwright") from error
    chromium = os.environ.get("MLSAE_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise harness.Absent("no Chromium; install one or set MLSAE_CHROMIUM")
    home = f"http://127.0.0.1:{site.port}"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])

        def tab() -> Any:
            context = browser.new_context(viewport={"width": 1280, "height": 900})
            context.add_cookies([{"name": f"mlsae-{site.port}", "value": site.token, "url": home}])
            return context.new_page()

        def ready(page: Any, path: str) -> float:
            page.goto(home + path, wait_until="commit")
            return page.evaluate(DRAWN, "html[data-ready]") - page.evaluate("performance.timeOrigin")

        def clicked(page: Any, path: str, selector: str, place: tuple[float, float]) -> float:
            ready(page, path)
            page.wait_for_load_state("networkidle")
            page.wait_for_selector(selector)
            x, y = page.evaluate(CLICK, [selector, place])
            page.mouse.move(x, y)
            if "canvas" in selector:  # which says what is under the mouse once it knows
                page.wait_for_selector(".readout b")
            page.wait_for_timeout(50)
            with page.expect_navigation(url="**/latents/*", wait_until="commit"):
                page.mouse.click(x, y)
            return page.evaluate(DRAWN, LATENT_DRAWN) - page.evaluate("+sessionStorage.getItem('clicked')")

        page = tab()
        yield Row("first page ever asked for, ready", [ready(page, "/overview")], "ms")
        cold = []
        for _ in range(rounds):
            fresh = tab()
            cold.append(ready(fresh, "/overview"))
            fresh.context.close()
        yield Row("first page interactive, cold cache", cold, "ms", 1000)
        yield Row("first page interactive, warm cache", [ready(page, "/overview") for _ in range(rounds)], "ms", 1000)
        places = [(0.1 + 0.8 * i / rounds, 0.4) for i in range(rounds)]
        seconds = [clicked(page, "/overview", "canvas.map", place) for place in places]
        yield Row("click on the heat map to latent drawn", seconds, "ms", 150)
        rows = [f"tbody tr:nth-child({i % 40 + 1}) a" for i in range(rounds)]
        seconds = [clicked(page, "/search?sort=density&descending=true", row, (0.5, 0.5)) for row in rows]
        yield Row("click on a row of the search to latent drawn", seconds, "ms", 150)
        browser.close()


def numbers(site: Site, rounds: int) -> Iterator[Row]:
    """Without a browser: what the pages ask for."""
    n = site.get("/overview.json")["sae"]["n_latents"]
    ids = [i * n // rounds for i in range(rounds)]
    for name, targets in {
        "/overview": ["/overview"] * rounds,
        "/heatmap.bin, 1,280 columns": ["/heatmap.bin?width=1280"] * rounds,
        "/latents/ID": [f"/latents/{i}" for i in ids],
        "/search.json, sorted and filtered": [
            f"/search.json?sort=density&centre_min=2&offset={i}" for i in range(rounds)
        ],
        "/latents/ID/neighbours.json": [f"/latents/{i}/neighbours.json" for i in ids],
    }.items():
        site.timed("GET", targets[0])
        yield Row(name, [1000 * site.timed("GET", target) for target in targets], "ms")


# ---- memory ----------------------------------------------------------------------------------------------------------

HOLD = """
import sys, torch, transformers
from mlsae import MLSAE, LanguageModel
sae = MLSAE.from_pretrained(sys.argv[1]).eval().requires_grad_(False)
lm = LanguageModel.from_pretrained(sys.argv[2]) if len(sys.argv) > 2 else None
if lm is not None:
    sae.encode(lm.resid(lm.tokenize("a dog ran home"), sae.layers))
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmRSS")))
"""


def memory(site: Site, run: Path, *, with_lm: bool) -> Iterator[Row]:
    """After everything was opened, less that of a process that holds the models and nothing else."""
    n = site.get("/overview.json")["sae"]["n_latents"]
    targets = ["/overview", "/heatmap.bin?width=4096", "/training.json", "/search.json?promoted=dog&token=a&sort=std"]
    for i in range(0, n, n // 50):
        targets += [f"/latents/{i}", f"/latents/{i}.json?layer=0", f"/latents/{i}/neighbours.json"]
        targets += [f"/latents/{i}/{name}.json" for name in ("coactive", "logits") if with_lm]
    if with_lm:
        edits = [{"latent": 3, "op": "add"}]
        for text in (STORY * 10, *TEXTS):
            for name in ("prompt", "logits", "steer"):
                site.ask("POST", f"/{name}.json", {"text": text} | ({} if name == "prompt" else {"edits": edits}))
    for target in targets:
        site.ask("GET", target)
    lm = [json.loads((run / "sae/config.json").read_text())["lm"]] if with_lm else []
    command = [sys.executable, "-c", HOLD, str(run / "sae"), *lm]
    held = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, **harness.ENVIRONMENT}
    )
    least, models = int(held.stdout) / 1024, "LM and SAE" if with_lm else "SAE"
    yield Row(f"memory, all opened, beyond torch, transformers, {models}", [site.memory() - least], "MiB", 300)
    yield Row(f"  of which torch, transformers, {models}", [least], "MiB")


# ---- prompts ---------------------------------------------------------------------------------------------------------


def prompts(site: Site, rounds: int) -> Iterator[Row]:
    """One who asks alone; every text is a new one."""
    first = site.timed("POST", "/prompt.json", {"text": STORY})
    yield Row("first prompt, the language model loaded for it", [first], "s")
    texts = texts_of(site, 64, rounds)
    yield Row("prompt of 64 tokens", [site.timed("POST", "/prompt.json", {"text": text}) for text in texts], "s", 1)
    edits = [{"latent": 7, "op": "add", "dose": 2.0}]
    for name, more in (
        ("one latent added everywhere", {"edits": edits}),
        ("all layers reconstructed", {"reconstruct": True}),
    ):
        asked = [{"text": text, "n_new": 20, **more} for text in texts]
        yield Row(
            f"steer 64 tokens for 20 more, {name}", [site.timed("POST", "/steer.json", each) for each in asked], "s"
        )
    asked = [{"text": text, "edits": edits} for text in texts]
    yield Row("logits of 64 positions", [site.timed("POST", "/logits.json", each) for each in asked], "s")


# ---- all of it -------------------------------------------------------------------------------------------------------


def main() -> int:
    """Print the table; 1 if a law was broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="run to look at (default: one is made up, in a minute)")
    parser.add_argument(
        "--lm-run", type=Path, metavar="DIR", help="run whose language model is here (default: left out)"
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--rounds", type=int, default=9, help="measurements of each time (default 9)")
    parser.add_argument("--crowd", type=int, default=1000, help="requests at once (default 1000)")
    parser.add_argument("--disconnects", type=int, default=100, help="clients that leave (default 100)")
    parser.add_argument("--fuzz", type=int, default=10_000, help="fuzzed requests (default 10000)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every measurement here")
    options = parser.parse_args()
    machine = harness.machine()
    print(f"{machine['cpu']}, {machine['cores']} cores, load {machine['load']}\n", flush=True)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="mlsae-explorer-") as folder:
        made = options.run is None and {"pages", "numbers", "memory"} & {*options.only}
        run = bigrun.make(Path(folder) / "run") if made else options.run
        for title, part in parts(options, run):
            print(title, flush=True)
            try:
                for row in part:
                    print(f"  {row}", flush=True)
                    rows.append(row)
            except harness.Absent as why:
                print(f"  left out: {why}")
    if options.json is not None:
        measured = [{**asdict(row), "statistic": row.statistic.__name__, "measured": row.measured} for row in rows]
        options.json.write_text(json.dumps({"machine": machine, "rows": measured}, indent=1) + "\n")
    return int(any(row.law and row.met is False for row in rows))


PARTS = ("pages", "numbers", "memory", "prompts", "crowds", "jobs", "fuzz")


def parts(options: argparse.Namespace, run: Path | None) -> Iterator[tuple[str, Iterator[Row]]]:
    """What is asked for, each beside its server."""
    lm_run: Path | None = options.lm_run

    def of(name: str, at: Path | None, rows: Callable[[Site], Iterator[Row]]) -> Iterator[tuple[str, Iterator[Row]]]:
        if name in options.only and at is not None:
            with serving(at) as site:
                yield f"{name}, {at.name}", rows(site)

    yield from of("pages", run, lambda site: pages(site, options.rounds))
    yield from of("numbers", run, lambda site: numbers(site, options.rounds))
    yield from of("memory", run, lambda site: memory(site, run, with_lm=False))
    yield from of("memory", lm_run, lambda site: memory(site, lm_run, with_lm=True))
    yield from of("prompts", lm_run, lambda site: prompts(site, options.rounds))
    yield from of("crowds", lm_run, lambda site: crowds(site, min(3, options.rounds), options.crowd))
    yield from of("jobs", lm_run, lambda site: long_jobs(site, options.disconnects))
    with tempfile.TemporaryDirectory(prefix="mlsae-fuzz-") as folder:
        fuzzed = None if (at := lm_run or run) is None else _twin(at, Path(folder) / at.name)
        yield from of("fuzz", fuzzed, lambda site: fuzz(site, options.fuzz))


def _twin(run: Path, twin: Path) -> Path:
    """The same run, but for the notes that are made on it."""
    twin.mkdir()
    for path in run.resolve().iterdir():
        if path.name != "notes.json":
            (twin / path.name).symlink_to(path)
    return twin


if __name__ == "__main__":
    sys.exit(main())
