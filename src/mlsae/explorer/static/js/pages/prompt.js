// Prompt: type a text; its tokens, latents and quality at every layer; a second text beside it.
import { html, useMemo, useState } from "../../vendor/preact-htm.module.js";
import { useAnswer } from "../api.js";
import { Figure, Scale } from "../figure.js";
import { count, largest, num, oneLine } from "../format.js";
import { PromptForm, TextBox, useDraft } from "../form.js";
import { LatentLink, Spark, steerLink, Strip, Table } from "../parts.js";
import { Largest, Map, overLayers, PromptHeatmap, Quality, tableOf, Top } from "../reading.js";
import { setQuery, useQuery, whole } from "../state.js";
import { Empty, Status } from "../status.js";

const TOP = 8;

function Form({ text, other }) {
  const [draft, setDraft] = useDraft(text);
  const [second, setSecond] = useDraft(other);
  const [two, setTwo] = useState(other !== "");
  const run = () => setQuery({ text: draft, other: two ? second : null, pos: draft === text ? undefined : null });
  return html`<${PromptForm} text=${draft} setText=${setDraft} run="Read" onRun=${() => (draft === text ? setQuery({ other: two ? second : null }) : run())}
    extra=${html`<label class="check"><input type="checkbox" checked=${two} onChange=${(e) => setTwo(e.target.checked)} />compare with a second text</label>`}>
    ${two && html`<${TextBox} name="other" label="Second text" value=${second} onInput=${setSecond} rows=${2} placeholder="The same with one word changed, perhaps" />`}
  <//>`;
}

/** What the tokens are coloured by, and the controls that choose it. */
function Colours({ reading, latent, row, text }) {
  const { layers } = reading;
  const ask = (event) => {
    const value = event.target.value.trim();
    if (/^[0-9]*$/.test(value)) setQuery({ latent: value });
  };
  return html`<div class="row">
    <label>latent <input class="n" name="latent" inputmode="numeric" placeholder="all" value=${latent ?? ""} onChange=${ask} /></label>
    <label>layer <select name="layer" value=${row === null ? "" : String(layers[row])} onChange=${(e) => setQuery({ layer: e.target.value })}><option value="">all, summed</option>${layers.map((l) => html`<option key=${l} value=${String(l)}>${l}</option>`)}</select></label>
    ${latent !== null && html`<span class="row small"><a href=${`/latents/${latent}`}>page of latent ${latent}</a><a href=${steerLink(latent, { text })}>steer with it</a><button type="button" class="quiet" onClick=${() => setQuery({ latent: null })}>All latents</button></span>`}
  </div>`;
}

function Reading({ reading, query, busy }) {
  const { tokens, layers } = reading;
  const latent = whole(query, "latent");
  const layer = whole(query, "layer");
  const row = layers.includes(layer) ? layers.indexOf(layer) : null;
  const asked = whole(query, "pos", tokens.length);
  const pos = asked ?? tokens.length - 1;
  const mine = reading.latent && reading.latent.latent === latent ? reading.latent : null;
  const table = useMemo(() => (mine ? tableOf(mine.cells, layers.length, tokens.length) : reading.activity), [reading, mine]);
  const levels = useMemo(() => overLayers(table, row, tokens.length), [table, row]);
  const max = largest(levels.filter((_, i) => tokens[i].visible)) || largest(levels);
  const onCell = (r, p) => setQuery({ layer: layers[r], pos: p }, { replace: true });
  const onLatent = (id) => setQuery({ latent: id });
  const name = mine ? `latent ${latent}` : "all latents";
  const seen = tokens.filter((t) => t.visible).length;
  const chosen = { row, col: pos };
  const csv = () => [["position", "id", "token", "visible", "value"], ...tokens.map((t, i) => [i, t.id, t.string, t.visible, levels[i]])];
  const text = query.get("text") ?? "";
  return html`<div class="body">
    <section aria-label="Tokens"><${Figure} level=${2} title="Tokens" name="tokens" csv=${csv} picture=${false} about=${html`${count(tokens.length, "token")}, ${num(seen)} visible to the SAE; shaded by ${name} ${row === null ? "summed over layers" : `at layer ${layer}`}${" "}<${Scale} to=${num(max)} />`}>
      <${Colours} reading=${reading} latent=${latent} row=${row} text=${text} />
      <div class=${busy ? "stale" : ""}><${Strip} tokens=${tokens} levels=${levels} max=${max} selected=${pos} onSelect=${(p) => setQuery({ pos: p }, { replace: true })} label="Tokens: arrow keys choose one" title=${(i) => `position ${i}, id ${tokens[i].id}${tokens[i].visible ? "" : ", masked"}: ${num(levels[i])}`} /></div>
      <p class="readout"><b>“${oneLine(tokens[pos].string)}”</b> position ${pos}, id ${tokens[pos].id}${tokens[pos].visible ? "" : ", masked: shown, never counted"}; ${name} ${num(levels[pos])}</p>
    <//></section>
    <div class="side">
      <${Map} reading=${reading} table=${table} name=${mine ? `latent-${latent}-map` : "activity-map"} selected=${chosen} onSelect=${onCell} title=${mine ? `Latent ${latent}` : "Activity of all latents"} about=${mine ? (mine.cells.length ? "activation by layer and position" : "not active anywhere in this prompt") : "summed activation by layer and position"} />
      <${Top} reading=${reading} row=${row} pos=${pos} latent=${latent} onLatent=${onLatent} />
    </div>
    <section aria-label="Latents of this prompt"><${PromptHeatmap} reading=${reading} latent=${latent} onLatent=${onLatent} /><${Largest} reading=${reading} latent=${latent} onLatent=${onLatent} text=${text} /></section>
    <section aria-labelledby="quality"><h2 id="quality">Reconstruction of this prompt</h2><${Quality} reading=${reading} selected=${chosen} onSelect=${onCell} /></section></div>`;
}

function Compare({ text, other }) {
  const request = useAnswer({ url: "/compare.json", body: { text, other } });
  const found = request.answer;
  if (!found || request.error) return html`<section><h2>Compared</h2><${Status} request=${request} /></section>`;
  const most = largest(found.latents.flatMap((r) => [r.a, r.b]));
  const pair = (key, layers, max) => (r) => html`${num(r[key])} <${Spark} values=${r[layers]} max=${max(r)} />`;
  const top = (r) => largest([...r.by_layer_a, ...r.by_layer_b]);
  const columns = [
    { key: "latent", title: "latent", cell: (r) => html`<${LatentLink} id=${r.latent} />` },
    { key: "a", title: "first text", hint: "mass per visible token, and by layer (layer 0 at the left)", cell: pair("a", "by_layer_a", top) },
    { key: "b", title: "second text", hint: "mass per visible token, and by layer (layer 0 at the left)", cell: pair("b", "by_layer_b", top) },
    { key: "d", title: "second − first", cell: (r) => num(r.b - r.a) },
    { key: "do", title: "", left: true, cell: (r) => html`<button type="button" class="quiet" onClick=${() => setQuery({ latent: r.latent })}>map</button>` },
  ];
  const csv = () => [["latent", "a", "b"], ...found.latents.map((r) => [r.latent, r.a, r.b])];
  return html`<section class=${request.busy ? "stale" : ""} aria-labelledby="compared"><h2 id="compared">Compared <span class="soft small">${num(found.both)} latents in both, ${num(found.only_a)} only in the first (${count(found.a.n_visible, "visible token")}), ${num(found.only_b)} only in the second (${num(found.b.n_visible)})</span></h2>
    <${Figure} title="Largest differences" about=${`mass per visible token; the largest is ${num(most)}`} name="compare" csv=${csv} picture=${false}><${Table} sticky=${true} label="Latents that differ most" columns=${columns} rows=${found.latents} rowKey=${(r) => r.latent} empty="Both texts activate the same latents equally." /><//></section>`;
}

/** The page. */
export function Page({ data }) {
  const query = useQuery();
  const text = query.get("text") ?? "";
  const other = query.get("other") ?? "";
  const latent = whole(query, "latent");
  const request = useAnswer(text === "" ? null : { url: "/prompt.json", body: { text, latent, top: TOP } }, data?.tokens ? data : null);
  const reading = text === "" ? null : request.answer;
  return html`<div class="body"><${Form} text=${text} other=${other} />
    ${(text !== "" && (request.error || !reading || request.busy || request.cancelled)) && html`<${Status} request=${request} />`}
    ${text === "" && html`<${Empty}>Type a text and press Read. The language model is loaded with the first one.<//>`}
    ${reading && html`<${Reading} reading=${reading} query=${query} busy=${reading.text !== text} />`}
    ${other !== "" && text !== "" && html`<${Compare} text=${text} other=${other} />`}</div>`;
}
