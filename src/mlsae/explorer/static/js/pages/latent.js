// Latent: its profile over layers, contexts by layer, what it writes, its neighbours, the user's note.
import { html, useMemo, useState } from "../../vendor/preact-htm.module.js";
import { ask, useAnswer } from "../api.js";
import { Chart, layerBars } from "../charts.js";
import { Examples } from "../examples.js";
import { Figure } from "../figure.js";
import { intervalOf, num, percent, valueOf } from "../format.js";
import { Bar, Facts, LatentLink, steerLink, Table, Tokens } from "../parts.js";
import { setQuery, useQuery, whole } from "../state.js";
import { Empty, Failure, OnDemand, Status } from "../status.js";

const NOTE_LIMIT = 4000;
const DUPLICATE = 0.9;

function facts({ summary: s, n_tokens: n }) {
  return [
    ["density", percent(s.density), `active at ${num(s.n_events)} of ${num(n)} tokens, at any layer`], ["events", num(s.n_events), "tokens at which it is active at some layer"],
    ["centre of mass, layer", s.centre_of_mass], ["std over layers", s.std], ["effective layers", s.effective_layers, "exp of the entropy of P(layer | latent)"],
    ["effective layers, one token", s.event_effective_layers, "the same within one token, mean over tokens"], ["active layers", num(s.n_active_layers)], ["entropy", s.entropy, "nats"],
    ["birth", num(s.birth), "first layer where it lives"], ["death", num(s.death), "last layer where it lives"], ["bimodality", s.bimodality],
  ];
}

function Profile({ data }) {
  const { layers, profile } = data;
  const charts = useMemo(() => {
    const rows = (values) => values.map((x, i) => ({ layer: layers[i], value: valueOf(x), ...(intervalOf(x) ? { lo: intervalOf(x)[0], hi: intervalOf(x)[1] } : {}) })).filter((r) => r.value !== null);
    const upper = layers.slice(0, -1);
    return [
      ["probability", "P(layer | latent)", "share of its activity, with 95 % intervals", layers, rows(profile.probability)],
      ["density", "Density", "share of tokens at which it is active", layers, rows(profile.density)],
      ["mean-activation", "Mean activation", "over the tokens where it is active", layers, rows(profile.mean_activation)],
      ["persistence", "Persistence", "of active tokens, share still active one layer on", upper, rows(profile.persistence)],
    ].filter(([, , , axis]) => axis.length).map(([key, title, about, axis, found]) => [key, title, about, layerBars(axis, found, title), () => [["layer", key, "low", "high"], ...found.map((r) => [r.layer, r.value, r.lo, r.hi])]]);
  }, [data]);
  return html`<section aria-labelledby="profile"><h2 id="profile">Profile over layers</h2><div class="four">
    ${charts.map(([key, title, about, draw, csv]) => html`<${Figure} key=${key} title=${title} about=${about} name=${`latent-${data.latent}-${key}`} csv=${csv}><${Chart} draw=${draw} label=${`${title} by layer`} /><//>`)}
  </div></section>`;
}

function Lens({ latent, query }) {
  const started = query.getAll("show").includes("logits");
  const request = useAnswer(started ? { url: `/latents/${latent}/logits.json` } : null);
  const found = request.answer;
  const columns = [
    { key: "layer", title: "layer", left: true, cell: (r) => r.layer },
    { key: "norm", title: "relative norm", hint: "norm of its mean contribution over the mean norm of the residual stream", cell: (r) => num(r.relative_norm) },
    { key: "promoted", title: "promotes", left: true, wrap: true, cell: (r) => html`<${Tokens} items=${r.promoted} digits=${2} />` },
    { key: "suppressed", title: "suppresses", left: true, wrap: true, cell: (r) => html`<${Tokens} items=${r.suppressed} digits=${2} />` },
  ];
  return html`<div class="stack"><h3>Logit lens by layer</h3>
    <${OnDemand} request=${request} started=${started} start=${() => show(query, "logits")} label="Read it at every layer" about="what its direction adds to the logits at each layer, through the frame of that layer; loads the language model" />
    ${found && html`${found.same_at_every_layer && html`<p class="small soft">The direction is the same at every layer; only its share of the stream's norm differs.</p>`}<${Table} sticky=${true} stacked=${true} label="Logit lens by layer" columns=${columns} rows=${[...found.layers].reverse()} />`}</div>`;
}

const show = (query, what) => setQuery({ show: [...new Set([...query.getAll("show"), what])] }, { replace: true });

function Writes({ data, query }) {
  return html`<section aria-labelledby="writes"><h2 id="writes">What it writes</h2>
    <div class="two"><div class="stack"><h3>Promoted tokens</h3><div><${Tokens} items=${data.promoted} /></div></div><div class="stack"><h3>Suppressed tokens</h3><div><${Tokens} items=${data.suppressed} /></div></div></div>
    <${Lens} latent=${data.latent} query=${query} /></section>`;
}

function Nearest({ latent }) {
  const request = useAnswer({ url: `/latents/${latent}/neighbours.json?n=20` });
  const rows = request.answer?.neighbours ?? [];
  const columns = [
    { key: "latent", title: "latent", cell: (r) => html`<${LatentLink} id=${r.latent} />` },
    { key: "cosine", title: "cosine", cell: (r) => html`${num(r.cosine)} <${Bar} value=${Math.abs(r.cosine)} max=${1} less=${r.cosine < 0} />` },
    { key: "centre", title: "centre of mass", cell: (r) => num(r.centre_of_mass) },
    { key: "spread", title: "eff. layers", cell: (r) => num(r.effective_layers) },
    { key: "same", title: "", left: true, cell: (r) => (r.cosine >= DUPLICATE ? html`<span class="soft small">near duplicate</span>` : "") },
  ];
  const csv = () => [["latent", "cosine", "centre_of_mass", "effective_layers"], ...rows.map((r) => [r.latent, r.cosine, r.centre_of_mass, r.effective_layers])];
  return html`<${Figure} title="Nearest latents" about="by the cosine of decoder rows" name=${`latent-${latent}-nearest`} csv=${csv} picture=${false}>
    ${request.answer ? html`<${Table} sticky=${true} label="Nearest latents" columns=${columns} rows=${rows} rowKey=${(r) => r.latent} />` : html`<${Status} request=${request} />`}<//>`;
}

function Coactive({ latent, query }) {
  const started = query.getAll("show").includes("coactive");
  const request = useAnswer(started ? { url: `/latents/${latent}/coactive.json` } : null);
  const found = request.answer;
  const columns = [
    { key: "latent", title: "latent", cell: (r) => html`<${LatentLink} id=${r.latent} />` },
    { key: "share", title: "share", hint: "of the tokens and layers where this latent is active, where that one is too", cell: (r) => html`${percent(r.share)} <${Bar} value=${r.share} max=${1} />` },
    { key: "lift", title: "lift", hint: "the share over that latent's density at those layers", cell: (r) => num(r.lift) },
    { key: "cosine", title: "cosine", cell: (r) => num(r.cosine) },
  ];
  const csv = () => [["latent", "share", "lift", "cosine"], ...found.coactive.map((r) => [r.latent, r.share, r.lift, r.cosine])];
  return html`<${Figure} title="Co-active latents" about=${found ? `in its ${num(found.contexts)} strongest contexts, ${num(found.tokens)} tokens and layers` : "active at the same tokens and layers"} name=${`latent-${latent}-coactive`} csv=${found ? csv : null} picture=${false}>
    <${OnDemand} request=${request} started=${started} start=${() => show(query, "coactive")} label="Find them" about="reads its strongest contexts with the language model" />
    ${found && html`<${Table} sticky=${true} label="Co-active latents" columns=${columns} rows=${found.coactive} rowKey=${(r) => r.latent} empty="None." />`}<//>`;
}

function Note({ latent, saved }) {
  const [text, setText] = useState(saved);
  const [kept, setKept] = useState(saved);
  const [said, say] = useState("");
  const [error, setError] = useState(null);
  const save = async (event) => {
    event?.preventDefault();
    setError(null);
    try {
      const found = await ask(`/latents/${latent}/note`, { method: "PUT", body: { note: text } });
      setKept(found.note);
      say("Saved.");
    } catch (problem) {
      setError(problem);
    }
  };
  const keys = (e) => e.key === "Enter" && (e.ctrlKey || e.metaKey) && save(e);
  return html`<form class="stack" onSubmit=${save}><h3>Your note</h3>
    <textarea name="note" rows="3" maxlength=${NOTE_LIMIT} aria-label="Your note on this latent" placeholder="What you think it means. Kept beside the analysis on this machine." value=${text} onInput=${(e) => { setText(e.target.value); say(""); }} onKeyDown=${keys}></textarea>
    <div class="row"><button type="submit" disabled=${text === kept}>Save note</button><span class="small soft" role="status">${text === kept ? said : `not saved, ${num(NOTE_LIMIT - text.length)} characters left`}</span></div>
    ${error && html`<${Failure} error=${error} />`}</form>`;
}

/** The page. */
export function Page({ data: first }) {
  const query = useQuery();
  const layer = whole(query, "layer");
  const request = useAnswer({ url: `/latents/${first.latent}.json${layer === null ? "" : `?layer=${layer}`}` }, first);
  const data = request.answer;
  const { latent } = data;
  return html`<div class="body">
    ${data.summary && !data.alive && html`<${Empty}>This latent is not active on any of the ${num(data.n_tokens)} tokens analysed.<//>`}
    <div class="side"><div class="stack">${data.summary && html`<${Facts} rows=${facts(data)} />`}<p><a href=${steerLink(latent)}>Steer with it</a>${" · "}<a href=${`/prompt?latent=${latent}`}>Read a prompt with it</a></p></div><${Note} latent=${latent} saved=${first.note ?? ""} /></div>
    ${data.profile && data.alive && html`<${Profile} data=${data} />`}
    ${request.error && html`<${Status} request=${request} />`}
    <${Examples} data=${data} query=${query} layer=${layer} busy=${request.busy} />
    <${Writes} data=${data} query=${query} />
    <section aria-labelledby="near"><h2 id="near">Like it</h2><div class="two"><${Nearest} latent=${latent} /><${Coactive} latent=${latent} query=${query} /></div></section></div>`;
}
