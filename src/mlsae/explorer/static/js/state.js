// The page's state is its address: what is set here is in the URL, so that a link shows the same thing.
import { useEffect, useState } from "../vendor/preact-htm.module.js";

/** Longer states are kept in this tab's history instead: servers refuse very long addresses. */
const LONGEST_URL = 6000;

const listeners = new Set();
let query = read();

function read() {
  return new URLSearchParams(history.state?.held ?? location.search);
}

function tell() {
  for (const listener of [...listeners]) listener(query);
}

/** A query with `patch` applied: null, "" and false remove a key, an array repeats it. */
function patched(from, patch) {
  const next = new URLSearchParams(from);
  for (const [key, value] of Object.entries(patch)) {
    next.delete(key);
    for (const item of Array.isArray(value) ? value : [value]) {
      if (item !== null && item !== undefined && item !== "" && item !== false) next.append(key, String(item));
    }
  }
  return next;
}

/** Change the state; `replace` leaves no step to go back to. */
export function setQuery(patch, { replace = false } = {}) {
  const next = patched(query, patch);
  const text = next.toString();
  if (text === query.toString()) return;
  const fits = text.length <= LONGEST_URL;
  const url = location.pathname + (fits && text ? `?${text}` : "");
  history[replace ? "replaceState" : "pushState"]({ held: fits ? null : text }, "", url);
  query = next;
  tell();
}

/** Whether the state is too long for a link. */
export const isHeld = () => Boolean(history.state?.held);

/** The state now, and again whenever it changes (also by back and forward). */
export function useQuery() {
  const [value, set] = useState(query);
  useEffect(() => {
    listeners.add(set);
    set(query);
    return () => listeners.delete(set);
  }, []);
  return value;
}

/** Call `listener` with every new state. */
export function onQuery(listener) {
  listeners.add(listener);
}

/** A whole number of the query within [0, end), or null. */
export function whole(q, key, end = Infinity) {
  const text = q.get(key);
  if (text === null || !/^[0-9]{1,15}$/.test(text)) return null;
  return Number(text) < end ? Number(text) : null;
}

window.addEventListener("popstate", () => {
  query = read();
  tell();
});
