// The aggregate heat map, latents by layers: up to millions of latents, asked for as the screen shows them.
import { html, useEffect, useRef, useState } from "../vendor/preact-htm.module.js";
import { columnOf, fetchBlock, pictureOf } from "./blocks.js";
import { num } from "./format.js";
import { drawLayers, sized } from "./grid.js";
import { onTheme, ramp } from "./ramp.js";
import { setQuery, whole } from "./state.js";
import { Failure } from "./status.js";

const GUTTER = 44;
const FOOT = 20;
const FEWEST = 12;
const clamp = (x, lo, hi) => Math.max(lo, Math.min(hi, x));

/** A view moved by `shift` places and zoomed by `factor` about a place; stays within 0 and total. */
function moved({ start, stop }, total, { shift = 0, factor = 1, about = (start + stop) / 2 }) {
  const span = clamp((stop - start) * factor, Math.min(FEWEST, total), total);
  const left = clamp(about - ((about - start) / (stop - start)) * span + shift, 0, total - span);
  return { start: left, stop: left + span };
}

function paint(canvas, { layers, rowHeight, view, blocks, cursor }) {
  const width = canvas.parentElement.clientWidth;
  const height = layers.length * rowHeight;
  const c = sized(canvas, width, height + FOOT);
  const { tint, ink, other, soft } = ramp();
  const inner = width - GUTTER;
  c.fillStyle = tint;
  c.fillRect(GUTTER, 0, inner, height);
  drawLayers(c, layers, rowHeight, height);
  if (!view) return;
  const scale = inner / (view.stop - view.start);
  c.save();
  c.beginPath();
  c.rect(GUTTER, 0, inner, height);
  c.clip();
  for (const block of blocks) {
    if (!block) continue;
    const x = GUTTER + (block.start - view.start) * scale;
    const w = (block.stop - block.start) * scale;
    c.imageSmoothingEnabled = w < block.nColumns;
    c.drawImage(pictureOf(block), x, 0, w, height);
  }
  if (cursor) {
    const x = GUTTER + (cursor.place - view.start) * scale;
    const y = height - (cursor.row + 1) * rowHeight;
    c.fillStyle = other;
    c.fillRect(x - 0.5, 0, 1, height);
    c.strokeStyle = ink;
    c.lineWidth = 1.5;
    c.strokeRect(x - 4, y + 0.75, 8, rowHeight - 1.5);
  }
  c.restore();
  c.fillStyle = soft;
  c.textBaseline = "bottom";
  c.textAlign = "left";
  c.fillText(num(Math.round(view.start)), GUTTER, height + FOOT - 2);
  c.textAlign = "right";
  c.fillText(num(Math.round(view.stop)), width, height + FOOT - 2);
  c.textAlign = "center";
  if (inner > 420) c.fillText("latents, in the order of their centre of mass", GUTTER + inner / 2, height + FOOT - 2);
}

/** Where the map is, its blocks and its cursor: everything that changes faster than the page draws. */
function useMap(layers, rowHeight, query, fail) {
  const canvas = useRef(null);
  const [, redraw] = useState(0);
  const map = useRef({ view: null, base: null, near: null, cursor: null, total: 0, frame: 0, timer: 0, controller: null }).current;
  map.paint = () => {
    cancelAnimationFrame(map.frame);
    map.frame = requestAnimationFrame(() => canvas.current && paint(canvas.current, { layers, rowHeight, view: map.view, blocks: [map.base, map.near], cursor: map.cursor }));
  };
  map.look = async () => {
    map.controller?.abort();
    map.controller = new AbortController();
    const { signal } = map.controller;
    const width = (canvas.current.parentElement.clientWidth - GUTTER) * (window.devicePixelRatio || 1);
    try {
      if (!map.base) {
        map.base = await fetchBlock({ width, signal });
        map.total = map.base.total;
        const [start, stop] = [whole(query, "start"), whole(query, "stop")];
        const asked = start !== null && stop !== null && start < stop && stop <= map.total;
        map.view = asked ? { start, stop } : { start: 0, stop: map.total };
        map.paint();
      }
      const [start, stop] = [Math.floor(map.view.start), Math.ceil(map.view.stop)];
      const all = start === 0 && stop === map.total;
      if (!all) map.near = await fetchBlock({ start, stop, width, signal });
      else map.near = null;
      setQuery({ start: all ? null : start, stop: all ? null : stop }, { replace: true });
      map.paint();
      fail(null);
      redraw((n) => n + 1);
    } catch (error) {
      if (error.name !== "AbortError") fail(error);
    }
  };
  map.go = (change) => {
    if (!map.view) return;
    map.view = change === null ? { start: 0, stop: map.total } : moved(map.view, map.total, change);
    map.paint();
    clearTimeout(map.timer);
    map.timer = setTimeout(map.look, 80);
  };
  map.point = (cursor) => {
    map.cursor = cursor;
    map.paint();
    redraw((n) => n + 1);
  };
  map.latent = (place) => {
    const block = map.near && place >= map.near.start && place < map.near.stop ? map.near : map.base;
    const column = columnOf(block, place);
    return { id: block.latents[column], share: (row) => block.values[row * block.nColumns + column] / 255, of: (block.stop - block.start) / block.nColumns };
  };
  useEffect(() => {
    map.look();
    const watch = new ResizeObserver(map.paint);
    watch.observe(canvas.current.parentElement);
    const still = onTheme(map.paint);
    return () => {
      watch.disconnect();
      still();
      map.controller?.abort();
      clearTimeout(map.timer);
      cancelAnimationFrame(map.frame);
    };
  }, []);
  return [canvas, map];
}

/** Pointer, wheel and keys of the map. */
function useHands(canvas, map, layers, rowHeight, open) {
  const hands = useRef(new Map()).current;
  const where = (event) => {
    const rect = canvas.current.getBoundingClientRect();
    const x = clamp((event.clientX - rect.left - GUTTER) / (rect.width - GUTTER), 0, 0.999999);
    const row = clamp(layers.length - 1 - Math.floor((event.clientY - rect.top) / rowHeight), 0, layers.length - 1);
    return { place: map.view.start + x * (map.view.stop - map.view.start), row };
  };
  const perPixel = () => (map.view.stop - map.view.start) / (canvas.current.clientWidth - GUTTER);
  useEffect(() => {
    const onWheel = (event) => {
      const mine = event.ctrlKey || document.activeElement === canvas.current;
      const sideways = Math.abs(event.deltaX) > Math.abs(event.deltaY);
      if (!map.view || !(mine || sideways)) return;
      event.preventDefault();
      if (sideways) map.go({ shift: event.deltaX * perPixel() });
      else map.go({ factor: Math.exp(clamp(event.deltaY, -200, 200) * (event.ctrlKey ? 0.01 : 0.002)), about: where(event).place });
    };
    canvas.current.addEventListener("wheel", onWheel, { passive: false });
  }, []);
  return {
    onPointerDown(event) {
      if (!map.view || event.button !== 0) return;
      canvas.current.setPointerCapture(event.pointerId);
      hands.set(event.pointerId, { x: event.clientX, from: event.clientX, far: 0 });
    },
    onPointerMove(event) {
      if (!map.view) return;
      const hand = hands.get(event.pointerId);
      if (hand) {
        const others = [...hands.values()].filter((h) => h !== hand);
        const shift = -(event.clientX - hand.x) * perPixel();
        if (others.length) {
          const before = Math.max(10, Math.abs(hand.x - others[0].x));
          const after = Math.max(10, Math.abs(event.clientX - others[0].x));
          map.go({ factor: before / after, about: where({ clientX: (event.clientX + others[0].x) / 2, clientY: event.clientY }).place });
        } else if (hand.far > 4) map.go({ shift });
        hand.far = Math.max(hand.far, Math.abs(event.clientX - hand.from));
        hand.x = event.clientX;
      }
      map.point(where(event));
    },
    onPointerUp(event) {
      const hand = hands.get(event.pointerId);
      const alone = hands.size === 1;
      hands.delete(event.pointerId);
      if (hand && alone && hand.far <= 4 && map.view) open(map.latent(where(event).place).id, where(event).row);
    },
    onPointerCancel: (event) => hands.delete(event.pointerId),
    onPointerLeave: () => !hands.size && map.point(null),
    onKeyDown(event) {
      if (!map.view || event.ctrlKey || event.metaKey || event.altKey) return;
      const span = map.view.stop - map.view.start;
      const at = map.cursor ?? { place: (map.view.start + map.view.stop) / 2, row: 0 };
      const step = Math.max(1, span / (canvas.current.clientWidth - GUTTER));
      const move = (dx, dy) => {
        const place = clamp(at.place + dx * step, 0, map.total - 0.5);
        if (place < map.view.start || place >= map.view.stop) map.go({ shift: dx * step * 40 });
        map.point({ place, row: clamp(at.row + dy, 0, layers.length - 1) });
      };
      const [dx, dy] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key] ?? [0, 0];
      if (event.shiftKey && dx) map.go({ shift: (dx * span) / 4 });
      else if (dx || dy) move(dx, dy);
      else if (event.key === "+" || event.key === "=") map.go({ factor: 0.5, about: at.place });
      else if (event.key === "-") map.go({ factor: 2, about: at.place });
      else if (event.key === "0" || event.key === "Home") map.go(null);
      else if (event.key === "Enter") open(map.latent(at.place).id, at.row);
      else return;
      event.preventDefault();
    },
  };
}

/** The columns on the screen as rows of CSV: place in the order, the latent in the middle, P(layer | latent). */
function rowsOf({ view, near, base }, layers) {
  const block = near ?? base;
  if (!block) return [];
  const width = (block.stop - block.start) / block.nColumns;
  const columns = [...block.latents].map((latent, column) => ({ latent, column, place: Math.floor(block.start + (column + 0.5) * width) }));
  const shown = columns.filter(({ place }) => place >= view.start && place < view.stop);
  return [["place", "latent", ...layers.map((l) => `layer_${l}`)], ...shown.map(({ place, latent, column }) => [place, latent, ...layers.map((_, row) => block.values[row * block.nColumns + column] / 255)])];
}

/** The heat map of P(layer | latent), its controls and the cell pointed at in words; `rows.current` gives it as CSV rows. */
export function Heatmap({ layers, query, rows }) {
  const [error, fail] = useState(null);
  const rowHeight = clamp(Math.round(300 / layers.length), 8, 40);
  const [canvas, map] = useMap(layers, rowHeight, query, fail);
  const open = (id, row) => location.assign(`/latents/${id}?layer=${layers[row]}`);
  const hands = useHands(canvas, map, layers, rowHeight, open);
  rows.current = () => rowsOf(map, layers);
  const { cursor } = map;
  const found = cursor && map.base ? map.latent(cursor.place) : null;
  return html`<div class="stack">${error && html`<${Failure} error=${error} again=${map.look} />`}<div class="stack"><canvas class="map" ref=${canvas} tabindex="0" role="application" aria-label="Share of each latent's activity by layer. Arrow keys move, plus and minus zoom, 0 shows all, Enter opens the latent." ...${hands}></canvas></div>
    <div class="row"><p class="readout" aria-live="polite">${found
      ? html`<b>latent ${found.id}</b>, layer ${layers[cursor.row]}: P(layer | latent) = <b>${num(found.share(cursor.row), 2)}</b>${found.of > 1.01 ? ` (mean of ${num(Math.round(found.of))} latents beside it)` : ""}`
      : "Point at the map; click opens the latent. Drag moves, ctrl + wheel or pinch zooms (plain wheel once it has the focus)."}</p>
      <span class="push"></span><button type="button" class="quiet" onClick=${() => map.go({ factor: 0.5 })} aria-label="Zoom in">+</button><button type="button" class="quiet" onClick=${() => map.go({ factor: 2 })} aria-label="Zoom out">−</button>
      <button type="button" class="quiet" onClick=${() => map.go(null)}>All</button></div></div>`;
}
