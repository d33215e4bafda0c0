// Edits of latents: LATENT:LAYERS:OP:DOSE in the address, a small editor on the page.
import { html } from "../vendor/preact-htm.module.js";
import { num } from "./format.js";

const OPS = [
  ["add", "add", "adds DOSE times the latent's mean activation at that layer"],
  ["clamp", "clamp", "sets the activation to DOSE times its mean"],
  ["ablate", "ablate", "sets the activation to zero"],
];

/** {latent, layers: [..] | null, op, dose} of `7:3,4:add:2`, or null if it is none. */
function parseEdit(text) {
  const [, latent, layers, op, dose] = /^([0-9]{1,15}):(all|[0-9]+(?:,[0-9]+)*):(add|clamp|ablate):(-?[0-9.]+(?:e-?[0-9]+)?)$/.exec(text) ?? [];
  if (latent === undefined || !Number.isFinite(Number(dose))) return null;
  return { latent: Number(latent), layers: layers === "all" ? null : layers.split(",").map(Number), op, dose: Number(dose) };
}

/** The text of an edit, as the address has it. */
export const formatEdit = ({ latent, layers, op, dose }) => `${latent}:${layers === null ? "all" : layers.join(",")}:${op}:${dose}`;

/** An edit in a few words; `nLayers` of the SAE are all of them. */
export function wordsOf({ latent, layers, op, dose }, nLayers = Infinity) {
  const where = layers === null || layers.length >= nLayers ? "all layers" : `layer${layers.length === 1 ? "" : "s"} ${layers.join(", ")}`;
  return op === "ablate" ? `ablate latent ${latent} at ${where}` : `${op} ${num(dose)} × latent ${latent} at ${where}`;
}

function LayerToggles({ all, chosen, onChange }) {
  const toggle = (layer) => {
    const next = (chosen ?? []).includes(layer) ? chosen.filter((l) => l !== layer) : [...(chosen ?? []), layer].sort((a, b) => a - b);
    onChange(next.length ? next : null);
  };
  return html`<div class="toggles" role="group" aria-label="Layers">
    <button type="button" aria-pressed=${chosen === null} onClick=${() => onChange(null)}>all</button>
    ${all.map((layer) => html`<button key=${layer} type="button" aria-pressed=${chosen?.includes(layer) ?? false} aria-label=${`layer ${layer}`} onClick=${() => toggle(layer)}>${layer}</button>`)}
  </div>`;
}

function Edit({ edit, at, site, unit, onChange, onRemove }) {
  const put = (patch) => onChange({ ...edit, ...patch });
  const dose = (event) => Number.isFinite(event.target.valueAsNumber) && put({ dose: event.target.valueAsNumber });
  return html`<div class="edit" role="group" aria-label=${`Edit ${at + 1}`}>
    <div class="row">
      <label>latent <input class="n" name=${`latent-${at}`} inputmode="numeric" required pattern="[0-9]+" value=${edit.latent ?? ""} aria-label="Latent" onInput=${(e) => /^[0-9]+$/.test(e.target.value) && put({ latent: Number(e.target.value) })} /></label>
      <div class="toggles" role="group" aria-label="What to do">${OPS.map(([op, name, hint]) => html`<button key=${op} type="button" title=${hint} aria-pressed=${edit.op === op} onClick=${() => put({ op })}>${name}</button>`)}</div>
      ${edit.op !== "ablate" && html`<label class="row">dose <input type="range" min="-20" max="20" step="0.5" value=${edit.dose} aria-label="Dose" onInput=${dose} />
        <input class="n" type="number" step="any" min="-10000" max="10000" value=${edit.dose} aria-label="Dose as a number" onChange=${dose} /></label>`}
      <span class="small soft">${unit}</span>
      <button type="button" class="quiet push" onClick=${onRemove} aria-label=${`Remove edit ${at + 1}`}>Remove</button>
    </div>
    <div class="row"><label>at layers</label><${LayerToggles} all=${site?.layers ?? []} chosen=${edit.layers} onChange=${(layers) => put({ layers })} /></div>
  </div>`;
}

/** The list of edits with a button that adds one. `units` puts the unit of an answered edit in words, by its place. */
export function Edits({ edits, site, units = [], onChange }) {
  const put = (at, edit) => onChange(edits.map((e, i) => (i === at ? edit : e)));
  return html`<div class="stack">
    ${edits.map((edit, i) => html`<${Edit} key=${i} at=${i} edit=${edit} site=${site} unit=${units[i]} onChange=${(e) => put(i, e)} onRemove=${() => onChange(edits.filter((_, j) => j !== i))} />`)}
    <div><button type="button" onClick=${() => onChange([...edits, { latent: null, layers: null, op: "add", dose: 4 }])}>+ Edit a latent</button></div>
  </div>`;
}

/** The edits of the query that can be read. */
export const editsOf = (query) => query.getAll("edit").map(parseEdit).filter((e) => e !== null);
