"""The pictures of docs/explorer.md: every page of a run's explorer, wide and narrow, light and dark.

python docs/screenshots.py RUN --chromium /usr/bin/chromium
"""

import argparse
from pathlib import Path
from urllib.parse import urlencode

from playwright.sync_api import Browser, sync_playwright

from mlsae.explorer import open_explorer

OUT = Path(__file__).parent / "explorer"
TEXT = "I will send to the Congress a bill that would reform the laws of this country. We will ask the Senate to"
SIZES = {"wide": (1280, 1000), "narrow": (390, 844)}


def pages(latent: int) -> dict[str, str]:
    """Where each page is, at a state worth seeing."""
    return {
        "overview": "/overview",
        "prompt": f"/prompt?{urlencode({'text': TEXT, 'latent': latent})}",
        "latent": f"/latents/{latent}",
        "search": "/search?sort=n_events&descending=true",
        "steer": f"/steer?{urlencode({'text': TEXT, 'edit': f'{latent}:all:add:2', 'n_new': 10})}",
        "logits": f"/logits?{urlencode({'text': TEXT})}",
    }


def shoot(browser: Browser, url: str, token: str, latent: int, size: str, theme: str) -> None:
    """Every page at one width in one theme."""
    width, height = SIZES[size]
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=theme)  # ty: ignore[invalid-argument-type]
    context.add_cookies([{"name": f"mlsae-{url.rpartition(':')[2]}", "value": token, "url": url}])
    for name, path in pages(latent).items():
        page = context.new_page()
        page.set_default_timeout(180_000)
        page.goto(url + path)
        page.wait_for_selector("html[data-ready]", state="attached")
        page.wait_for_load_state("networkidle")
        page.screenshot(path=OUT / f"{name}-{size}-{theme}.png")
        page.close()
    context.close()


def main() -> None:
    """Open the run's explorer and take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--chromium", required=True)
    parser.add_argument("--latent", type=int, default=7)
    given = parser.parse_args()
    OUT.mkdir(exist_ok=True)
    with open_explorer(given.run) as running, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=given.chromium, args=["--no-sandbox", "--disable-gpu"])
        for size, theme in (("wide", "light"), ("narrow", "light"), ("wide", "dark")):
            shoot(browser, running.url, running.token, given.latent, size, theme)
        browser.close()


if __name__ == "__main__":
    main()
