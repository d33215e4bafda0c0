// Pieces of the big heat map as the server sends them, drawn into small pictures once.
import { ask } from "./api.js";
import { ramp } from "./ramp.js";

const HEADER_BYTES = 20;

/** Read a block: {nLayers, nColumns, start, stop, total, latents, values}, values by layer then column. */
function parseBlock(buffer) {
  const [nLayers, nColumns, start, stop, total] = new Uint32Array(buffer, 0, 5);
  const latents = new Int32Array(buffer, HEADER_BYTES, nColumns);
  const values = new Uint8Array(buffer, HEADER_BYTES + 4 * nColumns, nLayers * nColumns);
  return { nLayers, nColumns, start, stop, total, latents, values, picture: null };
}

/** The block of places start to stop (all of them without) in at most `width` columns. */
export async function fetchBlock({ start, stop, width, signal }) {
  const q = new URLSearchParams({ width: String(Math.max(1, Math.min(4096, Math.floor(width)))) });
  if (start !== undefined) q.set("start", start);
  if (stop !== undefined) q.set("stop", stop);
  return parseBlock(await ask(`/heatmap.bin?${q}`, { bytes: true, signal }));
}

/** The block as a picture of one pixel a cell, layer 0 at the bottom, in the colours of now (of the square root: small
 * shares show). */
export function pictureOf(block) {
  const { words } = ramp();
  if (block.picture && block.words === words) return block.picture;
  const { nLayers, nColumns, values } = block;
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [nColumns, nLayers];
  const c = canvas.getContext("2d");
  const image = c.createImageData(nColumns, nLayers);
  const pixels = new Uint32Array(image.data.buffer);
  const colours = Uint32Array.from({ length: 256 }, (_, v) => words[Math.round(Math.sqrt(v / 255) * 255)]);
  for (let row = 0; row < nLayers; row++) {
    const to = (nLayers - 1 - row) * nColumns;
    for (let col = 0; col < nColumns; col++) pixels[to + col] = colours[values[row * nColumns + col]];
  }
  c.putImageData(image, 0, 0);
  return Object.assign(block, { picture: canvas, words }).picture;
}

/** The column of a place in a block. */
export const columnOf = (block, place) => Math.max(0, Math.min(block.nColumns - 1, Math.floor(((place - block.start) * block.nColumns) / (block.stop - block.start))));
