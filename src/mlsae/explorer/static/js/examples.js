// Example contexts of a latent: columns of layers side by side, or one layer in full.
import { html, useMemo } from "../vendor/preact-htm.module.js";
import { Figure, Scale } from "./figure.js";
import { largest, num, oneLine, shade, valueOf } from "./format.js";
import { setQuery } from "./state.js";
import { Empty } from "./status.js";

function Context({ example, max }) {
  const { tokens, activations, centre, value, document, quantile } = example;
  return html`<div class="context">
    <div>${tokens.map((text, i) => html`<span key=${i} class=${`tok ${shade(activations[i], max)} ${i === centre ? "peak" : ""}`} title=${num(activations[i])}>${oneLine(text)}</span>`)}</div>
    <small>${num(value)}${quantile === null || quantile === undefined ? "" : `, quantile ${num(quantile)}`}${document === null || document === undefined ? "" : `, document ${document}`}</small>
  </div>`;
}

const rowsOf = (examples) => [["layer", "kind", "value", "quantile", "document", "centre", "token", "activation"],
  ...examples.flatMap(({ layer, top, sampled }) => [["top", top], ["sampled", sampled]].flatMap(([kind, list]) => list.flatMap((e) => e.tokens.map((t, i) => [layer, kind, e.value, e.quantile, e.document, e.centre, t, e.activations[i]]))))];

/** The section of example contexts; the layer and the kind (top, or drawn from quantiles) are in the address. */
export function Examples({ data, query, layer, busy }) {
  const { examples, layers, latent } = data;
  const kind = query.get("kind") === "sampled" ? "sampled" : "top";
  const max = useMemo(() => largest(examples.flatMap((e) => [...e.top, ...e.sampled]).flatMap((e) => e.activations)), [examples]);
  const shown = layer === null ? examples : examples.filter((e) => e.layer === layer);
  const have = layer === null ? new Set(examples.map((e) => e.layer)) : null;
  const share = (l) => valueOf(data.profile?.probability?.[layers.indexOf(l)] ?? null);
  const list = (items, words) => (items.length ? items.map((e, i) => html`<${Context} key=${i} example=${e} max=${max} />`) : html`<p class="small soft">${words}</p>`);
  const choose = (to) => setQuery({ layer: to });
  const column = (e) => html`<div key=${e.layer}><h3><button type="button" class="quiet" title="All of this layer" onClick=${() => choose(e.layer)}>layer ${e.layer}</button> <span class="soft small">P ${num(share(e.layer), 2)}</span></h3>${list(e[kind], kind === "top" ? "No top contexts." : "None sampled.")}</div>`;
  return html`<section aria-labelledby="examples" class=${busy ? "stale" : ""}>
    <${Figure} level=${2} title="Contexts" name=${`latent-${latent}-contexts`} csv=${() => rowsOf(shown)} picture=${false} about=${html`layers side by side; tokens shaded by activation, the strongest underlined${" "}<${Scale} to=${num(max)} />`}>
      <div class="row">
        ${layer === null && html`<div class="toggles" role="group" aria-label="Which contexts">
          <button type="button" aria-pressed=${kind === "top"} onClick=${() => setQuery({ kind: null })}>strongest</button>
          <button type="button" aria-pressed=${kind === "sampled"} onClick=${() => setQuery({ kind: "sampled" })}>from every quantile</button></div>`}
        <div class="toggles" role="group" aria-label="Layer"><button type="button" aria-pressed=${layer === null} onClick=${() => choose(null)}>all layers</button>
          ${layers.map((l) => html`<button key=${l} type="button" aria-label=${`layer ${l}`} aria-pressed=${l === layer} disabled=${have !== null && !have.has(l)} onClick=${() => choose(l)}>${l}</button>`)}</div>
      </div>
      ${shown.length === 0 && html`<${Empty}>${data.examples.length || layer !== null ? "No contexts kept at this layer." : "No example contexts are kept for this latent."}<//>`}
      ${layer === null
        ? html`<div class="contexts" tabindex="0" role="region" aria-label="Contexts by layer">${shown.map(column)}</div>`
        : shown.map((e) => html`<div key=${e.layer} class="two"><div class="stack"><h3>Strongest</h3>${list(e.top, "None.")}</div><div class="stack"><h3>From every quantile</h3>${list(e.sampled, "None.")}</div></div>`)}
    <//></section>`;
}
