// The one colour ramp, as the theme has it now, for canvases.

const triple = (name, style) => {
  const hex = style.getPropertyValue(name).trim().slice(1);
  const long = hex.length === 3 ? [...hex].map((c) => c + c).join("") : hex;
  return [0, 2, 4].map((i) => parseInt(long.slice(i, i + 2), 16));
};

let table = null;
const listeners = new Set();

function build() {
  const style = getComputedStyle(document.documentElement);
  const [lo, mid, hi] = ["--lo", "--mid", "--hi"].map((name) => triple(name, style));
  const rgba = new Uint8ClampedArray(256 * 4);
  const css = [];
  for (let i = 0; i < 256; i++) {
    const t = i / 255;
    const [from, to, u] = t < 0.5 ? [lo, mid, 2 * t] : [mid, hi, 2 * t - 1];
    const rgb = from.map((x, c) => Math.round(x + (to[c] - x) * u));
    rgba.set([...rgb, 255], 4 * i);
    css.push(`rgb(${rgb.join(",")})`);
  }
  const ink = (name) => style.getPropertyValue(name).trim();
  return { rgba, css, words: new Uint32Array(rgba.buffer), ink: ink("--ink"), soft: ink("--soft"), line: ink("--line"), other: ink("--other"), paper: ink("--paper"), tint: ink("--tint") };
}

/** {rgba, css, words}: 256 colours as bytes, CSS and machine words; and the theme's ink, soft, line, other, paper, tint. */
export function ramp() {
  table ??= build();
  return table;
}

/** Call `redraw` when the theme changes; gives the function that stops it. */
export function onTheme(redraw) {
  listeners.add(redraw);
  return () => listeners.delete(redraw);
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  table = null;
  for (const redraw of listeners) redraw();
});
