// Keyboard: going to pages, the search box, the previous and next latent.
import { theSite } from "./api.js";

const PAGES = { o: "/overview", p: "/prompt", s: "/search", t: "/steer", l: "/logits" };
const LIST = [
  ["/", "search box: a latent's id or a token"],
  ["g o", "overview"], ["g p", "prompt"], ["g s", "search"], ["g t", "steer"], ["g l", "logits"],
  ["[  ]", "previous, next latent"],
  ["← → ↑ ↓", "move in a heat map or in the tokens; Enter opens"],
  ["+  −  0", "zoom in, out and reset the heat map; Shift ← → moves it"],
  ["Ctrl Enter", "run the form"],
  ["?", "this list"],
];

function showKeys() {
  let dialog = document.getElementById("key-list");
  if (dialog === null) {
    dialog = document.createElement("dialog");
    dialog.id = "key-list";
    dialog.setAttribute("aria-label", "Keyboard shortcuts");
    const title = document.createElement("h2");
    title.textContent = "Keyboard shortcuts";
    const list = document.createElement("dl");
    for (const [keys, what] of LIST) {
      const term = document.createElement("dt");
      term.append(Object.assign(document.createElement("kbd"), { textContent: keys }));
      list.append(term, Object.assign(document.createElement("dd"), { textContent: what }));
    }
    const close = Object.assign(document.createElement("button"), { textContent: "Close" });
    close.addEventListener("click", () => dialog.close());
    dialog.append(title, list, close);
    document.body.append(dialog);
  }
  if (!dialog.open) dialog.showModal();
}

async function toNeighbour(step) {
  const at = /^\/latents\/([0-9]+)$/.exec(location.pathname)?.[1];
  if (at === undefined) return;
  const { n_latents } = await theSite();
  const to = Number(at) + step;
  if (to >= 0 && to < n_latents) location.assign(`/latents/${to}`);
}

/** Listen to the whole page's keys. */
export function listen() {
  let goes = 0;
  document.getElementById("keys").addEventListener("click", showKeys);
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.closest("input, textarea, select, dialog")) return;
    const going = Date.now() - goes < 1200;
    goes = 0;
    if (going && PAGES[event.key]) return location.assign(PAGES[event.key]);
    if (event.key === "g") goes = Date.now();
    else if (event.key === "?") showKeys();
    else if (event.key === "[") toNeighbour(-1);
    else if (event.key === "]") toNeighbour(1);
    else if (event.key === "/") document.querySelector("#go input").focus();
    else return undefined;
    event.preventDefault();
    return undefined;
  });
}

/** The box in the header: a number goes to that latent, words search for a promoted token. */
export function goBox() {
  const form = document.getElementById("go");
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const box = form.elements.promoted;
    const text = box.value;
    if (/^[0-9]+$/.test(text.trim())) {
      const { n_latents } = await theSite();
      const id = Number(text.trim());
      if (id < n_latents) return location.assign(`/latents/${id}`);
      box.setCustomValidity(`There is no latent ${id}: ids go from 0 to ${n_latents - 1}.`);
      box.reportValidity();
    } else if (text.trim()) location.assign(`/search?${new URLSearchParams({ promoted: text })}`);
    return undefined;
  });
  form.elements.promoted.addEventListener("input", (event) => event.target.setCustomValidity(""));
}
