// A small map, layers by columns, on a canvas: layer 0 at the bottom. Columns are positions or latents.
import { html, useEffect, useLayoutEffect, useRef, useState } from "../vendor/preact-htm.module.js";
import { onTheme, ramp } from "./ramp.js";

const GUTTER = 44;
const TEXT = 62;
const FONT = "11px system-ui, sans-serif";

/** Prepare a canvas of a size in CSS pixels; gives its context, scaled to the screen. */
export function sized(canvas, width, height) {
  const dpr = Math.min(window.devicePixelRatio || 1, 32000 / Math.max(width, height));
  const [w, h] = [Math.max(1, Math.round(width * dpr)), Math.max(1, Math.round(height * dpr))];
  if (canvas.width !== w || canvas.height !== h) [canvas.width, canvas.height] = [w, h];
  Object.assign(canvas.style, { width: `${width}px`, height: `${height}px` });
  const c = canvas.getContext("2d");
  c.setTransform(dpr, 0, 0, dpr, 0, 0);
  c.clearRect(0, 0, width, height);
  return c;
}

/** The labels of the layer axis: every one, or every second, fifth... where rows are thin. */
export function drawLayers(c, layers, rowHeight, height) {
  const every = [1, 2, 5, 10, 20, 50].find((step) => step * rowHeight >= 12) ?? 100;
  c.font = FONT;
  c.fillStyle = ramp().soft;
  c.textAlign = "right";
  c.textBaseline = "middle";
  layers.forEach((layer, row) => {
    if (row % every === 0) c.fillText(String(layer), GUTTER - 6, height - (row + 0.5) * rowHeight);
  });
  c.save();
  c.translate(9, height / 2);
  c.rotate(-Math.PI / 2);
  c.textAlign = "center";
  c.fillText("layer", 0, 0);
  c.restore();
}

const rowHeightOf = (n, tall) => Math.max(8, Math.min(tall ? 26 : 22, Math.round(300 / n)));

function paint(canvases, { layers, n, value, max, colText, selected }, cursor, cell, rowHeight, words) {
  const { css, tint, other, ink, soft } = ramp();
  const height = layers.length * rowHeight;
  drawLayers(sized(canvases.axis, GUTTER, height + words), layers, rowHeight, height);
  const c = sized(canvases.map, Math.max(1, n * cell), height + words);
  const gap = cell >= 8 && rowHeight >= 10 ? 1 : 0;
  c.fillStyle = tint;
  c.fillRect(0, 0, n * cell, height);
  for (let row = 0; row < layers.length; row++) {
    const y = height - (row + 1) * rowHeight;
    for (let col = 0; col < n; col++) {
      const x = value(row, col);
      if (x === null || x === undefined) {
        c.clearRect(col * cell, y, cell, rowHeight);
        continue;
      }
      c.fillStyle = css[max > 0 ? Math.max(0, Math.min(255, Math.round((255 * x) / max))) : 0];
      c.fillRect(col * cell, y, cell - gap, rowHeight - gap);
    }
  }
  const ring = (at, colour) => {
    if (!at || at.col === null || at.col === undefined || at.col >= n) return;
    c.strokeStyle = colour;
    c.lineWidth = 2;
    const whole = at.row === null || at.row === undefined;
    const y = whole ? 1 : height - (at.row + 1) * rowHeight + 1;
    c.strokeRect(at.col * cell + 0.5, y, Math.max(3, cell - 2), (whole ? height : rowHeight) - 2);
  };
  ring(selected, other);
  ring(cursor, ink);
  if (!words) return;
  c.font = "10px ui-monospace, Menlo, Consolas, monospace";
  c.fillStyle = soft;
  c.textAlign = "right";
  c.textBaseline = "middle";
  for (let col = 0; col < n; col++) {
    c.save();
    c.translate((col + 0.5) * cell, height + 5);
    c.rotate(-Math.PI / 2);
    if (selected?.col === col) c.fillStyle = ink;
    const text = [...colText(col)];
    c.fillText(text.length > 9 ? `${text.slice(0, 8).join("")}…` : text.join(""), 0, 0);
    c.restore();
  }
}

/**
 * A map of value(row, col) / max, null where there is none. `readout(row, col)` puts a cell in words; a click or Enter
 * calls onSelect(row, col); the arrow keys move.
 */
export function Grid(props) {
  const { layers, n, label, readout, onSelect, selected, colText, hint = "Point at a cell.", minCell = 5, maxCell = 26 } = props;
  const box = useRef(null);
  const axis = useRef(null);
  const map = useRef(null);
  const [width, setWidth] = useState(0);
  const [cursor, setCursor] = useState(null);
  useLayoutEffect(() => {
    const watch = new ResizeObserver(() => setWidth(box.current.clientWidth));
    watch.observe(box.current);
    setWidth(box.current.clientWidth);
    return () => watch.disconnect();
  }, []);
  const cell = Math.max(minCell, Math.min(maxCell, (width - GUTTER) / n));
  const rowHeight = rowHeightOf(layers.length, n < 40);
  const words = colText && cell >= 11 ? TEXT : 0;
  const draw = () => width > 0 && paint({ axis: axis.current, map: map.current }, props, cursor, cell, rowHeight, words);
  useLayoutEffect(draw);
  useEffect(() => onTheme(() => setCursor((x) => (x ? { ...x } : { row: null, col: null }))), []);
  const at = (event) => {
    const rect = map.current.getBoundingClientRect();
    const col = Math.floor((event.clientX - rect.left) / cell);
    const row = layers.length - 1 - Math.floor((event.clientY - rect.top) / rowHeight);
    return col >= 0 && col < n && row >= 0 && row < layers.length ? { row, col } : null;
  };
  const move = (next) => {
    if (next?.row !== cursor?.row || next?.col !== cursor?.col) setCursor(next);
  };
  const onKeyDown = (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const [down, right] = { ArrowUp: [1, 0], ArrowDown: [-1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key] ?? [0, 0];
    const from = cursor?.col != null ? cursor : { row: selected?.row ?? 0, col: selected?.col ?? 0 };
    if (event.key === "Enter" && cursor?.col != null) onSelect?.(cursor.row, cursor.col);
    else if (down || right) {
      const next = { row: Math.max(0, Math.min(layers.length - 1, from.row + down)), col: Math.max(0, Math.min(n - 1, from.col + right)) };
      move(next);
      const [x, frame] = [next.col * cell + GUTTER, box.current];
      if (x + cell > frame.scrollLeft + frame.clientWidth || x - GUTTER < frame.scrollLeft) frame.scrollLeft = x - frame.clientWidth / 2;
    } else return;
    event.preventDefault();
  };
  const shown = cursor?.col != null && cursor.row != null && cursor.col < n ? cursor : null;
  return html`<div class="stack">
    <div class="scroll grid-box" ref=${box} tabindex="0" role="application" aria-label=${`${label}. Arrow keys move, Enter chooses.`} onKeyDown=${onKeyDown} onBlur=${() => move(null)}>
      <canvas class="axis" ref=${axis}></canvas><canvas class="grid" ref=${map} onPointerMove=${(e) => move(at(e))} onPointerLeave=${() => move(null)}
        onClick=${(e) => { const p = at(e); if (p) onSelect?.(p.row, p.col); }}></canvas>
    </div>
    <p class="readout" aria-live="polite">${shown ? readout(shown.row, shown.col) : hint}</p>
  </div>`;
}
