// Starts the page that the shell names, with the numbers that came with it.
import { html, render } from "../vendor/preact-htm.module.js";
import { goBox, listen } from "./keys.js";
import { onQuery } from "./state.js";
import { Failure } from "./status.js";

const PAGES = {
  overview: () => import("./pages/overview.js"),
  prompt: () => import("./pages/prompt.js"),
  latent: () => import("./pages/latent.js"),
  search: () => import("./pages/search.js"),
  steer: () => import("./pages/steer.js"),
  logits: () => import("./pages/logits.js"),
};

function copyButtons() {
  document.addEventListener("click", async (event) => {
    const button = event.target.closest("[data-copy]");
    if (button === null) return;
    const done = await navigator.clipboard.writeText(button.dataset.copy).then(() => true, () => false);
    button.textContent = done ? "Copied" : "Select it and copy";
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });
}

/** What of a page's state its JSON takes. */
const ASKED = {
  prompt: ["text", "latent"], latent: ["layer"], steer: ["text", "edit", "reconstruct", "n_new", "pos"], logits: ["text", "edit", "start", "top"],
  search: ["centre", "birth", "death", "spread", "density"].flatMap((x) => [`${x}_min`, `${x}_max`]).concat("token", "promoted", "sort", "descending", "offset", "limit"),
};

function twin(page) {
  const link = document.getElementById("twin");
  const path = link.getAttribute("href");
  const needsText = ["prompt", "steer", "logits"].includes(page);
  const follow = (query) => {
    const asked = new URLSearchParams([...query].filter(([key]) => ASKED[page]?.includes(key)));
    link.setAttribute("href", asked.size ? `${path}?${asked}` : path);
    link.hidden = needsText && !asked.has("text");
  };
  onQuery(follow);
  follow(new URLSearchParams(history.state?.held ?? location.search));
}

async function start() {
  const app = document.getElementById("app");
  const data = JSON.parse(document.getElementById("data").textContent || "null");
  listen();
  goBox();
  copyButtons();
  const { page } = document.body.dataset;
  const open = PAGES[page];
  if (!open) {
    document.documentElement.dataset.ready = "true";
    return;
  }
  twin(page);
  try {
    const { Page } = await open();
    render(html`<${Page} data=${data} />`, app);
    document.documentElement.dataset.ready = "true";
  } catch (error) {
    render(html`<${Failure} error=${{ field: "This page", allowed: `could not be drawn: ${error.message}` }} />`, app);
    throw error;
  }
}

start();
