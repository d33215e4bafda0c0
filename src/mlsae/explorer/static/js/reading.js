// Views of one reading of a prompt: maps over layers and positions, the top latents, quality.
import { html, useMemo } from "../vendor/preact-htm.module.js";
import { Chart, layerLine } from "./charts.js";
import { Figure, Scale } from "./figure.js";
import { largest, num, oneLine, shade } from "./format.js";
import { Grid } from "./grid.js";
import { LatentLink, Spark, steerLink, Table } from "./parts.js";
import { Empty } from "./status.js";

/** Sum over rows by position of a [row][pos] table, or one of its rows. */
export const overLayers = (table, row, n) => (row !== null ? table[row] : Array.from({ length: n }, (_, pos) => table.reduce((sum, r) => sum + (r[pos] ?? 0), 0)));

/** The cells of a latent as [row][pos], zero where it is not active. */
export function tableOf(cells, nLayers, nTokens) {
  const table = Array.from({ length: nLayers }, () => new Array(nTokens).fill(0));
  for (const [row, pos, value] of cells) table[row][pos] = value;
  return table;
}

/** The largest value of a [row][pos] table among visible positions: the masked ones are shown, never counted. */
function visibleMax(table, tokens) {
  let top = 0;
  for (const row of table) row.forEach((x, pos) => { if (tokens[pos].visible && x > top) top = x; });
  return top || largest(table.flat());
}

const at = (reading, row, pos) => `layer ${reading.layers[row]}, position ${pos}, token “${oneLine(reading.tokens[pos].string)}”${reading.tokens[pos].visible ? "" : " (masked)"}`;

/** A latent's activation, or all activity, by layer and position. */
export function Map({ reading, table, title, about, name, selected, onSelect }) {
  const { tokens, layers } = reading;
  const max = useMemo(() => visibleMax(table, tokens), [table]);
  const csv = () => [["layer", "position", "token", "visible", "value"], ...layers.flatMap((layer, row) => tokens.map((t, pos) => [layer, pos, t.string, t.visible, table[row][pos]]))];
  return html`<${Figure} title=${title} name=${name} csv=${csv} about=${html`${about}${" "}<${Scale} to=${num(max)} />`}>
    <${Grid} label=${title} layers=${layers} n=${tokens.length} value=${(row, pos) => table[row][pos]} max=${max} selected=${selected} onSelect=${onSelect} colText=${(pos) => oneLine(tokens[pos].string)}
      readout=${(row, pos) => html`<b>${num(table[row][pos])}</b> at ${at(reading, row, pos)}`} hint="Point at a cell; click chooses its layer and position." />
  <//>`;
}

/** The largest latents at one position, by layer (layer 0 at the bottom) or at one layer. */
export function Top({ reading, row, pos, latent, onLatent }) {
  const { layers, tokens, top } = reading;
  const max = largest(top.flatMap((r) => r[pos]?.map(([, v]) => v) ?? []));
  const pick = ([id, value]) => html`<button key=${id} type="button" class=${`chip ${shade(value, max)} ${id === latent ? "same" : ""}`} title=${`latent ${id}: ${num(value)}`} aria-current=${id === latent ? "true" : undefined} onClick=${() => onLatent(id)}>${id} <small>${num(value, 2)}</small></button>`;
  const rows = layers.map((_, r) => r).reverse();
  const csv = () => [["layer", "position", "latent", "activation"], ...top.flatMap((r, i) => r[pos].map(([id, v]) => [layers[i], pos, id, v]))];
  return html`<${Figure} title=${`Top latents at “${oneLine(tokens[pos].string)}”`} name="top-latents" csv=${csv} picture=${false} about=${`position ${pos}${row === null ? "" : `, layer ${layers[row]}`}`}>
    <${Table} sticky=${true} selected=${(r) => r === row} label="Top latents by layer" rows=${rows} rowKey=${(r) => r} columns=${[
      { key: "layer", title: "layer", left: true, cell: (r) => layers[r] },
      { key: "latents", title: "largest first", left: true, wrap: true, cell: (r) => (top[r][pos]?.length ? top[r][pos].slice(0, r === row ? 99 : 4).map(pick) : html`<span class="soft">none</span>`) },
    ]} />
  <//>`;
}

/** Mass of the prompt's largest latents by layer. */
export function PromptHeatmap({ reading, latent, onLatent }) {
  const { layers, heatmap } = reading;
  const max = useMemo(() => largest(heatmap.mass.flat()), [heatmap]);
  const chosen = heatmap.latents.indexOf(latent);
  const csv = () => [["latent", ...layers.map((l) => `layer_${l}`)], ...heatmap.latents.map((id, i) => [id, ...heatmap.mass.map((r) => r[i])])];
  return html`<${Figure} title="Latents of this prompt" name="prompt-heatmap" csv=${csv} about=${html`the ${num(heatmap.latents.length)} of largest mass (activation summed over visible tokens), by centre of mass${" "}<${Scale} to=${num(max)} />`}>
    <${Grid} label="Latents of this prompt by layer" layers=${layers} n=${heatmap.latents.length} minCell=${4} maxCell=${18} value=${(row, col) => heatmap.mass[row][col]} max=${max} selected=${chosen < 0 ? null : { row: null, col: chosen }}
      onSelect=${(_, col) => onLatent(heatmap.latents[col])} readout=${(row, col) => html`<b>latent ${heatmap.latents[col]}</b>, layer ${layers[row]}: mass ${num(heatmap.mass[row][col])}`} hint="Point at a cell; click shows that latent's map." />
  <//>`;
}

/** The latents of largest mass as a table. */
export function Largest({ reading, latent, onLatent, text }) {
  const { latents, tokens, layers } = reading;
  const columns = [
    { key: "latent", title: "latent", cell: (r) => html`<${LatentLink} id=${r.latent} />` },
    { key: "by_layer", title: "by layer", hint: "mass, layer 0 at the left", cell: (r) => html`<${Spark} values=${r.by_layer} />` },
    { key: "mass", title: "mass", hint: "activation summed over layers and visible tokens", cell: (r) => num(r.mass) },
    { key: "centre", title: "centre", hint: "centre of mass over layers, in this prompt", cell: (r) => num(r.centre_of_mass) },
    { key: "n_cells", title: "cells", hint: "layers and tokens where it is active", cell: (r) => num(r.n_cells) },
    { key: "peak", title: "peak", cell: (r) => num(r.peak) },
    { key: "where", title: "where", left: true, cell: (r) => html`layer ${r.peak_layer}, <span class="chip"><span class="tok">${oneLine(tokens[r.peak_pos]?.string ?? "")}</span></span>` },
    { key: "do", title: "", left: true, cell: (r) => html`<button type="button" class="quiet" onClick=${() => onLatent(r.latent)}>map</button> <a class="small" href=${steerLink(r.latent, { text })}>steer</a>` },
  ];
  const csv = () => [["latent", "mass", "peak", "peak_layer", "peak_pos", "n_cells", "centre_of_mass", ...layers.map((l) => `layer_${l}`)], ...latents.map((r) => [r.latent, r.mass, r.peak, r.peak_layer, r.peak_pos, r.n_cells, r.centre_of_mass, ...r.by_layer])];
  return html`<${Figure} title="Largest latents" about="by mass in this prompt" name="prompt-latents" csv=${csv} picture=${false}>
    <${Table} sticky=${true} label="Largest latents" columns=${columns} rows=${latents} rowKey=${(r) => r.latent} selected=${(r) => r.latent === latent} empty="No latent is active at a visible position." /><//>`;
}

/** FVU by layer and the error by layer and position. */
export function Quality({ reading, selected, onSelect }) {
  const { quality, layers, tokens } = reading;
  const draw = useMemo(() => layerLine(layers, layers.map((layer, i) => ({ layer, value: quality.fvu[i] })), "FVU"), [reading]);
  const max = useMemo(() => Math.min(visibleMax(quality.error, tokens), 2), [reading]);
  if (quality.fvu.every((x) => x === null)) return html`<${Empty}>FVU needs at least two visible tokens that differ: this prompt has no variance to explain.<//>`;
  const rows = () => [["layer", "fvu", "l0"], ...layers.map((l, i) => [l, quality.fvu[i], quality.l0[i]])];
  const cells = () => [["layer", "position", "token", "error"], ...layers.flatMap((l, r) => tokens.map((t, pos) => [l, pos, t.string, quality.error[r][pos]]))];
  return html`<div class="side-first">
    <${Figure} title="FVU by layer" about="of the visible positions" name="prompt-fvu" csv=${rows}><${Chart} draw=${draw} label="FVU by layer" /><//>
    <${Figure} title="Error by layer and position" name="prompt-error" csv=${cells} about=${html`share of the variance; averages to the layer's FVU; masked positions left out${" "}<${Scale} to=${num(max)} />`}>
      <${Grid} label="Error by layer and position" layers=${layers} n=${tokens.length} value=${(r, pos) => quality.error[r][pos]} max=${max} selected=${selected} onSelect=${onSelect} colText=${(pos) => oneLine(tokens[pos].string)}
        readout=${(r, pos) => html`error <b>${num(quality.error[r][pos])}</b> at ${at(reading, r, pos)}`} />
    <//></div>`;
}
