// Small parts of every page: numbers with intervals, tokens, latents, tables, bars.
import { html, useEffect, useRef } from "../vendor/preact-htm.module.js";
import { intervalOf, largest, num, oneLine, shade, valueOf } from "./format.js";

/** A number and, where known, its 95 % interval. */
export function Value({ of, format = num }) {
  const ci = intervalOf(of);
  return html`<span>${format(valueOf(of))}${ci && html`${" "}<span class="ci" title="95 % interval">[${format(ci[0])}, ${format(ci[1])}]</span>`}</span>`;
}

/** Names and values side by side; rows without a value are left out. */
export function Facts({ rows }) {
  const shown = rows.filter(([, value]) => value !== null && value !== undefined && value !== "");
  return html`<dl class="facts">${shown.map(([name, value, hint]) => html`<div key=${name} title=${hint}><dt>${name}</dt><dd>${typeof value === "number" || (typeof value === "object" && "value" in value) ? html`<${Value} of=${value} />` : value}</dd></div>`)}</dl>`;
}

/** A token's text, its leading space made visible. */
export function Tok({ text, level = "", title }) {
  const space = /^ +/.exec(text)?.[0] ?? "";
  return html`<span class=${`tok ${level}`} title=${title}>${space && html`<i class="ws">${"␣".repeat(space.length)}</i>`}${oneLine(text.slice(space.length))}</span>`;
}

/** A token in a box with a small number beside it, shaded by `value` of `max`. */
export function Chip({ text, value, note, max, same, title }) {
  return html`<span class=${`chip ${max ? shade(value, max) : ""} ${same ? "same" : ""}`} title=${title}><${Tok} text=${text} />${note !== undefined && html`<small>${note}</small>`}</span>`;
}

/** Chips of [{string, logit}]. */
export function Tokens({ items, digits = 3 }) {
  if (!items?.length) return html`<span class="soft">none known</span>`;
  return html`<span>${items.map((t, i) => html`<${Chip} key=${i} text=${t.string} note=${t.logit === null || t.logit === undefined ? undefined : num(t.logit, digits)} />`)}</span>`;
}

/** Tokens as text, shaded by `levels` (null: none); one can be chosen, also with the arrow keys. */
export function Strip({ tokens, levels, max, selected, onSelect, label, title }) {
  const box = useRef(null);
  useEffect(() => {
    const chosen = box.current?.children[selected ?? -1];
    const frame = box.current;
    if (!chosen || frame.scrollHeight <= frame.clientHeight) return;
    if (chosen.offsetTop < frame.scrollTop + frame.offsetTop || chosen.offsetTop > frame.scrollTop + frame.offsetTop + frame.clientHeight - 30) frame.scrollTop = chosen.offsetTop - frame.offsetTop - 60;
  }, [selected]);
  const onKeyDown = (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -10, ArrowDown: 10, Home: -1e9, End: 1e9 }[event.key];
    if (step === undefined || event.altKey || event.metaKey || event.ctrlKey) return;
    event.preventDefault();
    onSelect(Math.max(0, Math.min(tokens.length - 1, (selected ?? -Math.sign(step)) + step)));
  };
  const onClick = (event) => {
    const at = event.target.closest("[data-pos]")?.dataset.pos;
    if (at !== undefined) onSelect(Number(at));
  };
  return html`<div class="strip" ref=${box} role="listbox" tabindex="0" aria-label=${label} aria-activedescendant=${selected === null || selected === undefined ? undefined : `tok-${selected}`} onKeyDown=${onKeyDown} onClick=${onClick}>
    ${tokens.map((t, i) => html`<span key=${i} id=${`tok-${i}`} data-pos=${i} role="option" aria-selected=${i === selected} class=${`tok ${t.visible ? "" : "off"} ${shade(levels?.[i], max)}`} title=${title?.(i)}>${oneLine(t.string)}</span>`)}
  </div>`;
}

/** A link to a latent's page, by its id. */
export const LatentLink = ({ id, layer }) => html`<a href=${`/latents/${id}${layer === undefined ? "" : `?layer=${layer}`}`}>${id}</a>`;

/** The address of the steering page that adds one latent at the layers given (all of them by default). */
export function steerLink(latent, { text = "", layers = "all", dose = 4 } = {}) {
  const q = new URLSearchParams();
  if (text) q.set("text", text);
  q.append("edit", `${latent}:${layers}:add:${dose}`);
  return `/steer?${q}`;
}

/** A curve over layers, layer 0 at the left, filled from zero. */
export function Spark({ values, max = largest(values), label = "by layer, layer 0 at the left" }) {
  const n = values.length;
  const d = values.map((v, i) => (v > 0 && max > 0 ? `M${i} 20V${(20 - (19 * v) / max).toFixed(2)}H${i + 0.9}V20Z` : "")).join("");
  return html`<svg class="spark" viewBox=${`0 0 ${n} 20`} preserveAspectRatio="none" role="img" aria-label=${label}><path d=${d} /></svg>`;
}

/** A horizontal bar of value / max. */
export const Bar = ({ value, max, less = false }) =>
  html`<svg class=${`bar ${less ? "less" : ""}`} viewBox="0 0 100 7" preserveAspectRatio="none" aria-hidden="true"><rect class="bg" width="100" height="7" /><rect width=${max > 0 ? Math.max(0, Math.min(100, (100 * value) / max)) : 0} height="7" /></svg>`;

/** A table. Columns are {key, title, hint, cell(row), left, wrap, sortable}; `sort` is [key, descending]; `wide` fills the
 * page, `sticky` scrolls under its head, `stacked` puts the wide cells of a row under each other on a small screen. */
export function Table({ columns, rows, sort, onSort, rowKey, selected, sticky, wide, stacked, label, empty = "Nothing here." }) {
  const head = (c) => {
    const mine = sort && sort[0] === c.key;
    const arrow = mine ? (sort[1] ? " ↓" : " ↑") : "";
    return html`<th key=${c.key} scope="col" class=${c.left ? "left" : ""} title=${c.hint} aria-sort=${mine ? (sort[1] ? "descending" : "ascending") : undefined}>
      ${onSort && c.sortable !== false ? html`<button type="button" onClick=${() => onSort(c.key)}>${c.title}${arrow}</button>` : c.title}</th>`;
  };
  return html`<div class=${`scroll ${sticky ? "sticky" : ""} ${wide ? "wide" : ""} ${stacked ? "stacked" : ""}`} tabindex=${sticky ? 0 : undefined} role=${sticky ? "region" : undefined} aria-label=${sticky ? label : undefined}>
    <table><caption class="hidden">${label}</caption><thead><tr>${columns.map(head)}</tr></thead>
    <tbody>${rows.map((row, i) => html`<tr key=${rowKey ? rowKey(row) : i} class=${row.isTotal ? "total" : ""} aria-current=${selected?.(row) ? "true" : undefined}>
      ${columns.map((c) => html`<td key=${c.key} data-label=${stacked ? c.title : undefined} class=${`${c.left ? "left" : ""} ${c.wrap ? "wrap" : ""}`}>${c.cell(row)}</td>`)}</tr>`)}</tbody></table>
    ${rows.length === 0 && html`<p class="empty">${empty}</p>`}</div>`;
}
