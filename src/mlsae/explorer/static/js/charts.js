// Charts with Observable Plot. Depth is vertical everywhere: layer 0 at the bottom.
import { html, useLayoutEffect, useRef } from "../vendor/preact-htm.module.js";
import { num } from "./format.js";

const BAR = "var(--bar)";
const OTHER = "var(--other)";
const INK = "var(--ink)";

/** A chart that `draw(Plot, width)` gives, drawn again when its place changes size. */
export function Chart({ draw, label }) {
  const box = useRef(null);
  useLayoutEffect(() => {
    const place = box.current;
    let width = 0;
    const paint = () => {
      if (place.clientWidth === width || place.clientWidth < 120 || !window.Plot) return;
      width = place.clientWidth;
      place.replaceChildren(draw(window.Plot, width));
    };
    paint();
    const watch = new ResizeObserver(paint);
    watch.observe(place);
    return () => watch.disconnect();
  }, [draw]);
  return html`<div class="chart" ref=${box} role="img" aria-label=${label}></div>`;
}

function depth(layers, type = "band") {
  const row = Math.max(11, Math.min(22, 300 / layers.length));
  const every = [1, 2, 5, 10, 20, 50].find((step) => step * row >= 13) ?? 100;
  return {
    height: Math.round(row * layers.length) + 40,
    y: { type, domain: [...layers].reverse(), label: "layer", labelArrow: "none", ticks: layers.filter((_, i) => i % every === 0), tickSize: 0, padding: type === "band" ? 0.2 : 0.5 },
  };
}

/** 1500 as 1.5k, 0.25 as it is. */
const tick = (x) => (Math.abs(x) >= 1000 ? window.d3.format("~s")(x) : String(Number(x.toPrecision(6))));

const across = (label, domain, extra = {}) => ({ label, labelArrow: "none", labelAnchor: "center", grid: true, nice: true, ticks: 4, ...(domain ? { domain } : {}), ...extra });

/** Bars by layer with their intervals. `rows` are {layer, value, lo, hi}. */
export const layerBars = (layers, rows, name, domain) => (Plot, width) =>
  Plot.plot({
    ...depth(layers), width, marginLeft: 44, marginBottom: 34, marginTop: 6, x: across(name, domain),
    marks: [
      Plot.barX(rows, { x: "value", y: "layer", fill: BAR }),
      Plot.ruleY(rows.filter((r) => r.lo !== undefined), { x1: "lo", x2: "hi", y: "layer", stroke: INK, strokeWidth: 1.5 }),
      Plot.ruleX([0], { stroke: "currentColor" }),
      Plot.tip(rows, Plot.pointerY({ x: "value", y: "layer", title: (r) => `layer ${r.layer}\n${name} ${num(r.value)}${r.lo === undefined ? "" : ` [${num(r.lo)}, ${num(r.hi)}]`}` })),
    ],
  });

/** One or two curves over layers, with intervals where rows have them. `rows` are {layer, value, lo, hi, other}. */
export const layerLine = (layers, rows, name, { zero = true } = {}) => (Plot, width) => {
  const known = rows.filter((r) => r.value !== null && r.value !== undefined);
  const colour = (r) => (r.other ? OTHER : BAR);
  return Plot.plot({
    ...depth(layers, "point"), width, marginLeft: 44, marginBottom: 34, marginTop: 6, marginRight: 14, x: across(name, null, { zero }),
    marks: [
      Plot.ruleY(known.filter((r) => r.lo !== undefined), { x1: "lo", x2: "hi", y: "layer", stroke: colour }),
      Plot.line(known, { x: "value", y: "layer", z: (r) => String(r.other), stroke: colour, strokeWidth: 1.5 }),
      Plot.dot(known, { x: "value", y: "layer", fill: colour, r: 2.5 }),
      Plot.tip(known, Plot.pointer({ x: "value", y: "layer", title: (r) => `layer ${r.name ?? r.layer}${r.other ? ` (${r.other})` : ""}\n${name} ${num(r.value)}${r.lo === undefined ? "" : ` [${num(r.lo)}, ${num(r.hi)}]`}` })),
    ],
    color: { type: "identity" },
  });
};

/** A histogram {edges, counts}; `upright` puts its bins on the vertical axis, as layers are. */
export const histogram = ({ edges, counts }, name, { upright = false, height = 240 } = {}) => (Plot, width) => {
  const rows = counts.map((n, i) => ({ n, a: edges[i], b: edges[i + 1] }));
  const inset = counts.length > 60 ? 0 : 0.5;
  const words = (r) => `${num(r.a)} to ${num(r.b)}\n${num(r.n)} latents`;
  const bins = { label: name, labelArrow: "none", domain: [edges[0], edges.at(-1)] };
  const counted = { label: "latents", labelArrow: "none", grid: true, nice: true, ticks: 4, tickFormat: tick, labelAnchor: "center" };
  return Plot.plot({
    width, height, marginLeft: 44, marginBottom: 34, marginTop: 18,
    ...(upright ? { x: counted, y: bins } : { x: { ...bins, labelAnchor: "center" }, y: { ...counted, labelAnchor: "top" } }),
    marks: upright
      ? [Plot.rect(rows, { x1: 0, x2: "n", y1: "a", y2: "b", fill: BAR, insetTop: inset, insetBottom: inset }), Plot.tip(rows, Plot.pointerY({ x: "n", y: (r) => (r.a + r.b) / 2, title: words }))]
      : [Plot.rect(rows, { x1: "a", x2: "b", y1: 0, y2: "n", fill: BAR, insetLeft: inset, insetRight: inset }), Plot.tip(rows, Plot.pointerX({ x: (r) => (r.a + r.b) / 2, y: "n", title: words }))],
  });
};

/** A curve of training: `key` of the points over tokens. */
export const curve = (points, key, name) => (Plot, width) => {
  const known = points.filter((p) => p[key] !== null && p[key] !== undefined);
  const flat = known.every((p) => p[key] === known[0][key]);
  return Plot.plot({
    width, height: 170, marginLeft: 46, marginBottom: 34, marginTop: 18,
    x: { label: "tokens", labelArrow: "none", labelAnchor: "center", tickFormat: tick, ticks: 4 },
    y: { label: name, labelArrow: "none", grid: true, nice: true, ticks: 4, tickFormat: tick, ...(flat ? { domain: [0, 2 * (known[0]?.[key] || 0.5)] } : {}) },
    marks: [
      Plot.line(known, { x: "tokens", y: key, stroke: BAR, strokeWidth: 1.5 }),
      Plot.tip(known, Plot.pointerX({ x: "tokens", y: key, title: (p) => `step ${num(p.step)}\n${name} ${num(p[key])}` })),
    ],
  });
};
