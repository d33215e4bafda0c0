// What is going on, in words: waiting, refused, empty.
import { html } from "../vendor/preact-htm.module.js";
import { num } from "./format.js";

/** A refusal or failure in words, with a way to try again. */
export function Failure({ error, again }) {
  const given = error.given === null || error.given === undefined ? "" : ` (given: ${error.given})`;
  return html`<p class="error" role="alert">
    <b>${error.field ?? "Not shown"}:</b> ${error.allowed ?? error.message}${given}${" "}
    ${again && html`<button type="button" class="quiet" onClick=${again}>Try again</button>`}
  </p>`;
}

/** Nothing to show, and why. */
export const Empty = ({ children }) => html`<p class="empty">${children}</p>`;

function words(progress) {
  if (progress.lm === "loading") return "Loading the language model";
  const { running, queued } = progress;
  if (!running) return "Working";
  const behind = queued ? `, ${num(queued)} waiting` : "";
  return `${running.what}${running.of ? ` ${num(running.done)} of ${num(running.of)}` : ""}${behind}`;
}

/** The line under a form: progress with a cancel button, a refusal, or that it was cancelled. Its height is kept. */
export function Status({ request, idle = null }) {
  const { busy, progress, error, cancelled, cancel, again } = request;
  if (error) return html`<${Failure} error=${error} again=${again} />`;
  const running = progress?.running;
  return html`<div class="status" role="status" aria-live="polite">
    ${busy && progress && html`<progress ...${running?.of ? { max: running.of, value: running.done } : {}} aria-label="Progress" />
      <span>${words(progress)}…</span><button type="button" class="quiet" onClick=${cancel}>Cancel</button>`}
    ${!busy && cancelled && html`<span>Cancelled.</span><button type="button" class="quiet" onClick=${again}>Run again</button>`}
    ${!busy && !cancelled && idle}
  </div>`;
}

/** Why a button has nothing to show yet: the words, progress or the refusal of work done on demand. */
export function OnDemand({ request, started, start, label, about }) {
  if (!started) return html`<div class="row"><button type="button" onClick=${start}>${label}</button><span class="small soft">${about}</span></div>`;
  if (request.error || request.busy || request.cancelled) return html`<${Status} request=${request} />`;
  return null;
}
