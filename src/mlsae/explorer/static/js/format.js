// Numbers and names in words that people read.

const grouped = new Intl.NumberFormat("en");

/** A number with `digits` significant digits; "–" where there is none. */
export function num(x, digits = 3) {
  if (x === null || x === undefined || Number.isNaN(x)) return "–";
  if (x === 0) return "0";
  const size = Math.abs(x);
  if (Number.isInteger(x) && size < 1e15) return grouped.format(x);
  if (size >= 1e6 || size < 1e-3) return x.toExponential(digits - 1).replace("e+", "e");
  if (size >= 10 ** digits) return grouped.format(Math.round(x));
  return x.toPrecision(digits);
}

/** A share in percent; smaller ones keep significant digits. */
export function percent(x) {
  if (x === null || x === undefined) return "–";
  const p = 100 * x;
  if (p === 0) return "0 %";
  return `${Math.abs(p) >= 1 ? p.toFixed(1) : Math.abs(p) >= 1e-3 ? String(Number(p.toPrecision(2))) : p.toExponential(1)} %`;
}

/** The plain number of {value, ci95} or of a number. */
export const valueOf = (x) => (x !== null && typeof x === "object" ? x.value : x);

/** The interval of {value, ci95}, or null. */
export const intervalOf = (x) => (x !== null && typeof x === "object" ? (x.ci95 ?? null) : null);

/** A token on one line: newlines and tabs become signs. */
export const oneLine = (text) => text.replace(/\r/g, "␍").replace(/\n/g, "↵").replace(/\t/g, "⇥");

/** The class that shades by value: a0 for nothing, a1 to a15 up to `max`. */
export function shade(value, max) {
  if (!(value > 0) || !(max > 0)) return "a0";
  return `a${1 + Math.min(14, Math.floor((15 * value) / max))}`;
}

/** The largest of an iterable of numbers and nulls; 0 for none. */
export function largest(values) {
  let top = 0;
  for (const x of values) if (x > top) top = x;
  return top;
}

/** "1 token", "2 tokens". */
export const count = (n, word) => `${num(n)} ${word}${n === 1 ? "" : "s"}`;
