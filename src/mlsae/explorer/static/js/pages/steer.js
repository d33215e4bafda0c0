// Steer: edits of latents, and what the language model says before and after.
import { html } from "../../vendor/preact-htm.module.js";
import { useAnswer, useSite } from "../api.js";
import { editsOf, Edits, formatEdit, wordsOf } from "../edits.js";
import { Figure } from "../figure.js";
import { num, oneLine, percent } from "../format.js";
import { PromptForm, useDraft } from "../form.js";
import { Bar, Strip, Table, Tok } from "../parts.js";
import { setQuery, useQuery, whole } from "../state.js";
import { Empty, Status } from "../status.js";

const N_NEW = 20;

/** The unit of an answered edit in words: what dose 1 is. */
function unitWords(edit) {
  if (edit.op === "ablate" || edit.unit_from === "none") return edit.unit_from === "none" && edit.op !== "ablate" ? "dose in activation: its mean is not known" : "";
  const known = edit.unit.filter((x) => x !== null);
  const [lo, hi] = [Math.min(...known), Math.max(...known)];
  return `1 = ${lo === hi ? num(lo) : `${num(lo)} to ${num(hi)}`}, mean ${edit.unit_from === "analysis" ? "of the analysis" : "of this prompt"}`;
}

/** The units of an answer's edits, by place, where they are still those asked for. */
export const unitsOf = (answer, edits) => edits.map((e, i) => (answer?.edits?.[i]?.latent === e.latent && answer.edits[i].op === e.op && answer.edits[i].unit ? unitWords(answer.edits[i]) : ""));

function Form({ query, site, answer }) {
  const [text, setText] = useDraft(query.get("text") ?? "");
  const [edits, setEdits] = useDraft(editsOf(query));
  const [nNew, setNew] = useDraft(whole(query, "n_new", 65) ?? N_NEW);
  const [reconstruct, setReconstruct] = useDraft(query.get("reconstruct") === "true");
  const run = () => setQuery({
    text, edit: edits.filter((e) => e.latent !== null).map(formatEdit), reconstruct: reconstruct ? "true" : null, n_new: nNew === N_NEW ? null : nNew, pos: text === query.get("text") ? query.get("pos") : null,
  });
  return html`<${PromptForm} text=${text} setText=${setText} run="Steer" onRun=${run} extra=${html`
      <label>new tokens <input class="n" name="n_new" type="number" min="0" max="64" required value=${nNew} onInput=${(e) => setNew(Number(e.target.value))} /></label>
      <label class="check"><input type="checkbox" name="reconstruct" checked=${reconstruct} onChange=${(e) => setReconstruct(e.target.checked)} />replace all layers by their reconstruction</label>`}>
    <${Edits} edits=${edits} site=${site} units=${unitsOf(answer, edits)} onChange=${setEdits} />
  <//>`;
}

function Next({ title, rows, name, about }) {
  const max = rows[0]?.p ?? 1;
  return html`<${Figure} title=${title} about=${about} name=${name} picture=${false} csv=${() => [["id", "token", "p"], ...rows.map((r) => [r.id, r.string, r.p])]}>
    <${Table} label=${title} rows=${rows} rowKey=${(r) => r.id} columns=${[
      { key: "token", title: "token", left: true, cell: (r) => html`<span class="chip"><${Tok} text=${r.string} /></span>` },
      { key: "bar", title: "", cell: (r) => html`<${Bar} value=${r.p} max=${max} />` },
      { key: "p", title: "probability", cell: (r) => percent(r.p) },
    ]} /><//>`;
}

function Changes({ rows, kl }) {
  const max = Math.max(1e-9, ...rows.map((r) => Math.abs(r.steered - r.clean)));
  const csv = () => [["id", "token", "clean", "steered"], ...rows.map((r) => [r.id, r.string, r.clean, r.steered])];
  return html`<${Figure} title="Largest changes" about=${`KL ${num(kl)} nats`} name="steer-changes" picture=${false} csv=${csv}>
    <${Table} label="Largest changes of probability" rows=${rows} rowKey=${(r) => r.id} columns=${[
      { key: "token", title: "token", left: true, cell: (r) => html`<span class="chip"><${Tok} text=${r.string} /></span>` },
      { key: "bar", title: "", cell: (r) => html`<${Bar} value=${Math.abs(r.steered - r.clean)} max=${max} less=${r.steered < r.clean} />` },
      { key: "p", title: "before → after", cell: (r) => `${percent(r.clean)} → ${percent(r.steered)}` },
    ]} /><//>`;
}

function Text({ title, tokens, prompt }) {
  return html`<div class="stack"><h3>${title}</h3><div class="flow"><span class="prompt">${prompt}</span>${tokens.join("")}</div></div>`;
}

function Answer({ answer, busy, nLayers }) {
  const { tokens, pos, next, continuation, edits } = answer;
  const tail = tokens.slice(-12).map((t) => t.string).join("");
  const says = edits.length ? edits.map((e) => wordsOf(e, nLayers)).join("; ") : "no edits";
  return html`<div class=${`stack ${busy ? "stale" : ""}`}>
    <section aria-labelledby="cont"><h2 id="cont">Continuation <span class="soft small">${says}; ${num(answer.seconds, 2)} s</span></h2>
      <div class="two"><${Text} title="Before" tokens=${continuation.clean.tokens} prompt=${`…${tail}`} /><${Text} title="After" tokens=${continuation.steered.tokens} prompt=${`…${tail}`} /></div></section>
    <section aria-labelledby="next"><h2 id="next">Next token after “${oneLine(tokens[pos].string)}” <span class="soft small">position ${pos}: choose another in the text</span></h2>
      <${Strip} tokens=${tokens} selected=${pos} onSelect=${(p) => setQuery({ pos: p }, { replace: true })} label="Position whose next token is shown" />
      <div class="three"><${Next} title="Before" about="clean" name="steer-before" rows=${next.clean} /><${Next} title="After" about="steered" name="steer-after" rows=${next.steered} /><${Changes} rows=${next.changes} kl=${next.kl} /></div></section>
  </div>`;
}

/** The page. */
export function Page({ data }) {
  const query = useQuery();
  const site = useSite();
  const text = query.get("text") ?? "";
  const body = { text, edits: editsOf(query), reconstruct: query.get("reconstruct") === "true", n_new: whole(query, "n_new") ?? N_NEW, pos: whole(query, "pos") };
  const request = useAnswer(text === "" ? null : { url: "/steer.json", body }, data?.next ? data : null);
  const answer = text === "" ? null : request.answer;
  return html`<div class="body"><${Form} query=${query} site=${site} answer=${answer} />
    ${(text !== "" && (request.error || !answer || request.busy || request.cancelled)) && html`<${Status} request=${request} />`}
    ${text === "" && html`<${Empty}>Type a text, add an edit and press Steer. A dose is in units of the latent's own mean activation at each layer.<//>`}
    ${answer && html`<${Answer} answer=${answer} busy=${request.busy} nLayers=${site?.layers.length} />`}</div>`;
}
