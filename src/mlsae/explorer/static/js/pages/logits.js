// Logits: the next token at every position, clean, reconstructed and steered.
import { html } from "../../vendor/preact-htm.module.js";
import { useAnswer, useSite } from "../api.js";
import { editsOf, Edits, formatEdit, wordsOf } from "../edits.js";
import { Figure } from "../figure.js";
import { num, percent } from "../format.js";
import { PromptForm, useDraft } from "../form.js";
import { Chip, Facts, Table, Tok } from "../parts.js";
import { setQuery, useQuery, whole } from "../state.js";
import { Empty, Status } from "../status.js";
import { unitsOf } from "./steer.js";

const PAGE = 64;
const TOP = 5;

function Form({ query, site, answer }) {
  const [text, setText] = useDraft(query.get("text") ?? "");
  const [edits, setEdits] = useDraft(editsOf(query));
  const [top, setTop] = useDraft(whole(query, "top", 33) ?? TOP);
  const run = () => setQuery({ text, edit: edits.filter((e) => e.latent !== null).map(formatEdit), top: top === TOP ? null : top, start: text === query.get("text") ? query.get("start") : null });
  return html`<${PromptForm} text=${text} setText=${setText} run="Show" onRun=${run} extra=${html`<label>tokens a position <input class="n" name="top" type="number" min="1" max="20" required value=${top} onInput=${(e) => setTop(Number(e.target.value))} /></label>`}>
    <${Edits} edits=${edits} site=${site} units=${unitsOf(answer, edits)} onChange=${setEdits} /><//>`;
}

const facts = (m) => [
  ["cross-entropy, clean", num(m.ce_clean), "nats per token"], ["reconstructed", num(m.ce_reconstructed), "every layer replaced"], ["steered", m.ce_steered === null ? null : num(m.ce_steered)],
  ["KL, reconstructed", num(m.kl_reconstructed), "nats"], ["KL, steered", m.kl_steered === null ? null : num(m.kl_steered)], ["positions counted", num(m.n), "visible, with a next token"],
];

function Answer({ answer, busy, top }) {
  const { tokens, positions, mean, start, stop } = answer;
  const steered = positions.some((p) => p.steered);
  const chips = (list, actual) => (list ?? []).map((t, i) => html`<${Chip} key=${i} text=${t.string} value=${t.p} max=${1} same=${actual && t.id === actual.id} note=${percent(t.p).replace(" %", "")} title=${`${t.string}: ${percent(t.p)}`} />`);
  const column = (key, title, extra) => ({ key, title, left: true, wrap: true, cell: (r) => html`${chips(r[key], r.actual)}<div class="small soft">${extra(r)}</div>` });
  const columns = [
    { key: "pos", title: "pos", cell: (r) => r.pos },
    { key: "token", title: "token", left: true, cell: (r) => html`<span class=${`strip-token ${tokens[r.pos]?.visible ? "" : "soft"}`}><${Tok} text=${tokens[r.pos]?.string ?? ""} /></span>` },
    { key: "actual", title: "next is", left: true, cell: (r) => (r.actual ? html`<span class="chip same"><${Tok} text=${r.actual.string} /></span>` : html`<span class="soft">end</span>`) },
    column("clean", "clean", (r) => `CE ${num(r.ce_clean)}`),
    column("reconstructed", "reconstructed", (r) => `CE ${num(r.ce_reconstructed)}, KL ${num(r.kl_reconstructed)}`),
    ...(steered ? [column("steered", "steered", (r) => `CE ${num(r.ce_steered)}, KL ${num(r.kl_steered)}`)] : []),
  ];
  const kinds = steered ? ["clean", "reconstructed", "steered"] : ["clean", "reconstructed"];
  const csv = () => [["position", "kind", "rank", "id", "token", "p"], ...positions.flatMap((r) => kinds.flatMap((kind) => (r[kind] ?? []).map((t, i) => [r.pos, kind, i, t.id, t.string, t.p])))];
  const go = (to) => setQuery({ start: to > 0 ? to : null });
  return html`<div class=${`stack ${busy ? "stale" : ""}`}><${Facts} rows=${facts(mean)} />
    <${Figure} level=${2} title="By position" name="logits" csv=${csv} picture=${false} about=${html`the ${num(top)} most probable next tokens, percent; the actual one is framed`}>
      <div class="row"><span class="small soft">positions ${num(start)} to ${num(Math.max(start, stop - 1))} of ${num(tokens.length)}</span><span class="push"></span>
        <button type="button" disabled=${start === 0} onClick=${() => go(start - PAGE)}>Previous</button><button type="button" disabled=${stop >= tokens.length} onClick=${() => go(start + PAGE)}>Next</button></div>
      <${Table} wide=${true} stacked=${true} label="Next tokens by position" columns=${columns} rows=${positions} rowKey=${(r) => r.pos} /><//></div>`;
}

/** The page. */
export function Page({ data }) {
  const query = useQuery();
  const site = useSite();
  const text = query.get("text") ?? "";
  const start = whole(query, "start") ?? 0;
  const edits = editsOf(query);
  const top = whole(query, "top", 33) ?? TOP;
  const request = useAnswer(text === "" ? null : { url: "/logits.json", body: { text, edits, start, stop: start + PAGE, top } }, data?.positions ? data : null);
  const answer = text === "" ? null : request.answer;
  return html`<div class="body"><${Form} query=${query} site=${site} answer=${answer} />
    ${(text !== "" && (request.error || !answer || request.busy || request.cancelled)) && html`<${Status} request=${request} idle=${edits.map((e) => wordsOf(e)).join("; ")} />`}
    ${text === "" && html`<${Empty}>Type a text and press Show: the distributions of the language model, and of the same with every layer replaced by its reconstruction.<//>`}
    ${answer && html`<${Answer} answer=${answer} busy=${request.busy} top=${top} />`}</div>`;
}
