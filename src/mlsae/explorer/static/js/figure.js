// The frame of a figure: a title, what it shows, and its picture and numbers to take away.
import { html, useRef } from "../vendor/preact-htm.module.js";
import { ramp } from "./ramp.js";

function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

const cell = (x) => {
  const text = x === null || x === undefined ? "" : String(x);
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
};

/** Rows (the first names the columns) as CSV text. */
const csvOf = (rows) => rows.map((row) => row.map(cell).join(",")).join("\r\n") + "\r\n";

function onPaper(width, height, draw) {
  const scale = 2;
  const canvas = document.createElement("canvas");
  canvas.width = width * scale;
  canvas.height = height * scale;
  const c = canvas.getContext("2d");
  c.fillStyle = ramp().paper;
  c.fillRect(0, 0, canvas.width, canvas.height);
  c.scale(scale, scale);
  draw(c);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}

async function picture(svg) {
  const copy = svg.cloneNode(true);
  const { width, height } = svg.getBoundingClientRect();
  const style = getComputedStyle(svg);
  copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
  for (const [name, value] of [["width", width], ["height", height], ["color", style.color], ["fill", style.color], ["font-family", "sans-serif"], ["font-size", style.fontSize]]) copy.setAttribute(name, value);
  for (const part of copy.querySelectorAll("[fill^='var('], [stroke^='var(']")) {
    for (const name of ["fill", "stroke"]) {
      const variable = /^var\((--[a-z-]+)\)$/.exec(part.getAttribute(name) ?? "")?.[1];
      if (variable) part.setAttribute(name, style.getPropertyValue(variable).trim());
    }
  }
  const image = new Image();
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(new XMLSerializer().serializeToString(copy))}`;
  await image.decode();
  return image;
}

/** The figure's charts and canvases, where they stand on the page, as a PNG; what is scrolled away is in it too. */
async function pngOf(box) {
  const corner = box.getBoundingClientRect();
  const parts = [];
  for (const part of box.querySelectorAll("svg[class^='plot'], canvas")) {
    const rect = part.getBoundingClientRect();
    const scrolled = part.classList.contains("axis") ? 0 : (part.closest(".scroll")?.scrollLeft ?? 0);
    const place = { x: rect.left - corner.left + scrolled, y: rect.top - corner.top, width: rect.width, height: rect.height };
    parts.push({ ...place, image: part instanceof HTMLCanvasElement ? part : await picture(part) });
  }
  const width = Math.ceil(Math.max(...parts.map((p) => p.x + p.width))) + 24;
  const height = Math.ceil(Math.max(...parts.map((p) => p.y + p.height))) + 24;
  return onPaper(width, height, (c) => {
    for (const p of parts) c.drawImage(p.image, p.x + 12, p.y + 12, p.width, p.height);
  });
}

/** A figure: `csv` gives its rows, `name` the file's name; children are the drawing. */
export function Figure({ title, about, name, csv, picture: drawn = true, children, caption, level = 3 }) {
  const box = useRef(null);
  const file = `mlsae-${name}`;
  return html`<figure>
    <div class="figure-head">
      <${`h${level}`}>${title}<//>
      <span class="about">${about}</span><span class="tools">
        ${drawn && html`<button type="button" class="quiet" aria-label=${`${title} as a PNG picture`} onClick=${async () => save(await pngOf(box.current), `${file}.png`)}>PNG</button>`}
        ${csv && html`<button type="button" class="quiet" aria-label=${`${title} as CSV`} onClick=${() => save(new Blob([csvOf(csv())], { type: "text/csv" }), `${file}.csv`)}>CSV</button>`}
      </span>
    </div>
    <div ref=${box} class="stack">${children}</div>
    ${caption && html`<figcaption>${caption}</figcaption>`}
  </figure>`;
}

/** The ramp with its two ends named. */
export const Scale = ({ from = "0", to }) => html`<span class="scale">${from}<i></i>${to}</span>`;
