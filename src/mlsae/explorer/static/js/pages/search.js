// Search: filters, sortable columns, pages of rows; every one of them in the address.
import { html, useMemo } from "../../vendor/preact-htm.module.js";
import { useAnswer } from "../api.js";
import { num, percent } from "../format.js";
import { LatentLink, Spark, Table, Tok } from "../parts.js";
import { setQuery, useQuery } from "../state.js";
import { Status } from "../status.js";

const PAIRS = [
  ["centre", "centre of mass, layer"], ["birth", "first layer (birth)"], ["death", "last layer (death)"],
  ["spread", "effective layers"], ["density", "density, share of tokens"],
];
const WORDS = [["token", "active on the token"], ["promoted", "promotes the token"]];
const NAMES = [...PAIRS.flatMap(([key]) => [`${key}_min`, `${key}_max`]), ...WORDS.map(([key]) => key)];
const KEYS = [...NAMES, "sort", "descending", "offset", "limit"];

const COLUMNS = [
  { key: "latent", title: "latent", cell: (r) => html`<${LatentLink} id=${r.latent} />` },
  { key: "profile", title: "by layer", hint: "P(layer | latent), layer 0 at the left", sortable: false, cell: (r) => html`<${Spark} values=${r.profile} label=${`profile of latent ${r.latent}`} />` },
  { key: "centre_of_mass", title: "centre", hint: "centre of mass over layers", cell: (r) => num(r.centre_of_mass) },
  { key: "std", title: "std", hint: "standard deviation over layers", cell: (r) => num(r.std) },
  { key: "effective_layers", title: "eff. layers", hint: "exp of the entropy over layers", cell: (r) => num(r.effective_layers) },
  { key: "birth", title: "birth", hint: "first layer where it lives", cell: (r) => num(r.birth) },
  { key: "death", title: "death", hint: "last layer where it lives", cell: (r) => num(r.death) },
  { key: "density", title: "density", hint: "share of tokens at which it is active at any layer", cell: (r) => percent(r.density) },
  { key: "n_events", title: "events", hint: "tokens at which it is active at any layer", cell: (r) => num(r.n_events) },
  { key: "max_cosine", title: "max cosine", hint: "with its nearest latent's decoder row", cell: (r) => num(r.max_cosine) },
  { key: "neighbour", title: "nearest", sortable: false, cell: (r) => (r.neighbour === null ? "–" : html`<${LatentLink} id=${r.neighbour} />`) },
  { key: "promoted", title: "promotes", left: true, sortable: false, cell: (r) => r.promoted.map((t, i) => html`<span key=${i} class="chip"><${Tok} text=${t} /></span>`) },
];

function Filters({ query }) {
  const submit = (event) => {
    event?.preventDefault();
    const form = event.target.closest("form");
    if (form.reportValidity()) setQuery({ ...Object.fromEntries(NAMES.map((name) => [name, form.elements[name].value])), offset: null });
  };
  const number = (name, words) => html`<input name=${name} type="number" step="any" aria-label=${words} placeholder=${name.endsWith("min") ? "from" : "to"} value=${query.get(name) ?? ""} onChange=${submit} />`;
  return html`<form class="filters" onSubmit=${submit} aria-label="Filters">
    ${PAIRS.map(([key, words]) => html`<div class="field" key=${key}><label>${words}</label><div class="pair">${number(`${key}_min`, `${words}, from`)}<span class="soft">–</span>${number(`${key}_max`, `${words}, to`)}</div></div>`)}
    ${WORDS.map(([key, words]) => html`<div class="field" key=${key}><label>${words}<input name=${key} type="search" spellcheck="false" autocomplete="off" value=${query.get(key) ?? ""} onChange=${submit} /></label></div>`)}
    <div class="row"><button type="submit" class="main">Search</button><button type="button" onClick=${() => setQuery(Object.fromEntries(KEYS.map((key) => [key, null])))}>Clear</button></div>
  </form>`;
}

function Pages({ total, offset, limit, shown }) {
  const go = (to) => setQuery({ offset: to > 0 ? to : null });
  const to = offset + shown;
  return html`<div class="row"><span role="status">${total === 0 ? "No latent passes these filters." : html`<b>${num(total)}</b> latents; shown ${num(offset + 1)} to ${num(to)}`}</span>
    <span class="push"></span>
    <button type="button" disabled=${offset === 0} onClick=${() => go(0)}>First</button><button type="button" disabled=${offset === 0} onClick=${() => go(offset - limit)}>Previous</button>
    <button type="button" disabled=${to >= total} onClick=${() => go(offset + limit)}>Next</button>
    <label>rows <select value=${String(limit)} onChange=${(e) => setQuery({ limit: e.target.value === "50" ? null : e.target.value, offset: null })}>${["25", "50", "100", "200"].map((n) => html`<option key=${n} value=${n}>${n}</option>`)}</select></label>
  </div>`;
}

/** The page. */
export function Page({ data }) {
  const query = useQuery();
  const asked = new URLSearchParams([...query].filter(([key]) => KEYS.includes(key)));
  const request = useAnswer({ url: `/search.json${asked.size ? `?${asked}` : ""}` }, data?.rows ? data : null);
  const found = request.answer;
  const onSort = (key) => setQuery({ sort: key, descending: found.sort === key ? !found.descending : key !== "latent", offset: null });
  const filters = useMemo(() => html`<${Filters} query=${asked} />`, [asked.toString()]);
  return html`<div class="body">${filters}
    ${(request.error || !found || (request.busy && request.progress)) && html`<${Status} request=${request} />`}
    ${found?.missing?.filter((m) => !data?.missing?.some((known) => known.what === m.what)).map((m) => html`<p key=${m.what} class="notice"><b>Missing: ${m.what}.</b> ${m.why} ${m.command && html`<code>${m.command}</code>`}</p>`)}
    ${found && html`<section class=${request.busy ? "stale" : ""}>
      <${Pages} total=${found.total} offset=${found.offset} limit=${found.limit} shown=${found.rows.length} />
      <${Table} wide=${true} label="Latents" columns=${COLUMNS} rows=${found.rows} rowKey=${(r) => r.latent} sort=${[found.sort, found.descending]} onSort=${onSort} empty="Widen or clear the filters." />
    </section>`}</div>`;
}
