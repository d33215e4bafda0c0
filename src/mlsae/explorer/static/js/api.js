// Asking the server: one error shape, cancelling, progress of long work.
import { useEffect, useRef, useState } from "../vendor/preact-htm.module.js";

/** A refusal of the server: what was given, in which field, and what is allowed. */
class Refused extends Error {
  constructor(status, { field, given, allowed }) {
    super(allowed);
    Object.assign(this, { status, field, given, allowed });
  }
}

const SIGNED_OUT = "This tab is no longer signed in: open the address that `mlsae explore` printed.";
const GONE = "The server does not answer. Is `mlsae explore` still running?";

/** The JSON of `url` (or its bytes); throws Refused. With a body it is a POST, or what `method` says. */
export async function ask(url, { body, method, signal, bytes = false } = {}) {
  const options = { signal, headers: { accept: bytes ? "application/octet-stream" : "application/json" } };
  if (body !== undefined) {
    options.method = method ?? "POST";
    options.body = JSON.stringify(body);
    options.headers["content-type"] = "application/json";
  }
  let response;
  try {
    response = await fetch(url, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, { field: "server", given: null, allowed: GONE });
  }
  if (response.ok) return bytes ? response.arrayBuffer() : response.json();
  const found = await response.json().catch(() => null);
  if (response.status === 401) throw new Refused(401, { field: "token", given: null, allowed: SIGNED_OUT });
  throw new Refused(response.status, found?.error ?? { field: "server", given: null, allowed: `It answered ${response.status}.` });
}

/** Ask /progress.json three times a second, from 300 ms on, until the function returned here is called. */
function watchProgress(tell) {
  let over = false;
  const look = async () => {
    if (over) return;
    const found = await ask("/progress.json").catch(() => null);
    if (over) return;
    tell(found ?? {});
    timer = setTimeout(look, 333);
  };
  let timer = setTimeout(() => {
    tell({});
    look();
  }, 300);
  return () => {
    over = true;
    clearTimeout(timer);
  };
}

/** What a request has come to: {answer, error, busy, progress, cancelled, cancel, again}. `request` is {url, body} or
 * null; `first` is the answer that came with the page, which saves the first request. An old answer stays until the new one. */
export function useAnswer(request, first = null) {
  const key = request === null ? null : JSON.stringify(request);
  const [state, set] = useState({ answer: first, error: null, busy: false, progress: null, cancelled: false });
  const [round, setRound] = useState(0);
  const known = useRef(first === null ? null : key);
  const stop = useRef(() => {});
  useEffect(() => {
    if (key === null) set((old) => (old.busy ? { ...old, busy: false, progress: null } : old)); // its request was given up
    if (key === null || (known.current === key && round === 0)) return undefined;
    known.current = null;
    const controller = new AbortController();
    const finish = (change) => {
      unwatch();
      set((old) => ({ ...old, busy: false, progress: null, ...change }));
    };
    const unwatch = watchProgress((progress) => set((old) => ({ ...old, progress })));
    set((old) => ({ ...old, error: null, busy: true, cancelled: false, progress: null }));
    stop.current = () => {
      controller.abort();
      finish({ cancelled: true });
    };
    ask(request.url, { body: request.body, signal: controller.signal }).then(
      (answer) => controller.signal.aborted || finish({ answer, answerKey: key }),
      (error) => controller.signal.aborted || finish({ error }),
    );
    return () => {
      controller.abort();
      unwatch();
    };
  }, [key, round]);
  return { ...state, cancel: () => stop.current(), again: () => setRound((n) => n + 1) };
}

let site = null;

/** The SAE in short, {n_latents, layers}: from the shell, else asked once. */
export function theSite() {
  const { nLatents, layers } = document.body.dataset;
  if (nLatents !== undefined) site ??= Promise.resolve({ n_latents: Number(nLatents), layers: layers.split(",").filter(Boolean).map(Number) });
  site ??= ask("/overview.json").then((d) => d.sae, () => ({ n_latents: Infinity, layers: [] }));
  return site;
}

/** The SAE in short, or null until it is known. */
export function useSite() {
  const [value, set] = useState(null);
  useEffect(() => void theSite().then(set), []);
  return value;
}
