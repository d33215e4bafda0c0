// Overview: facts, the aggregate heat map, quality and similarity by layer, histograms, training.
import { html, useMemo, useRef } from "../../vendor/preact-htm.module.js";
import { histogram, layerLine, Chart } from "../charts.js";
import { Figure, Scale } from "../figure.js";
import { intervalOf, num, percent, valueOf } from "../format.js";
import { Heatmap } from "../heatmap.js";
import { Facts, Table, Value } from "../parts.js";
import { useQuery } from "../state.js";
import { Empty } from "../status.js";
import { Training } from "../training.js";

const QUALITY = [
  ["fvu", "FVU", "fraction of variance unexplained: 0 is perfect, 1 is predicting the mean"],
  ["delta_ce", "ΔCE", "what next-token cross-entropy loses when this layer is replaced, nats"],
  ["kl", "KL", "KL divergence of the next token when this layer is replaced, nats"],
  ["cosine", "cosine", "mean cosine of a vector and its reconstruction"],
  ["l0", "L0", "mean number of active latents"],
  ["l1", "L1", "mean sum of activations"],
  ["mse", "MSE", "mean squared error of a vector"],
];

/** The name of a folder without its path; an id as it is. */
const short = (lm) => (lm?.startsWith("/") ? lm.split("/").filter(Boolean).at(-1) : lm);

function facts({ sae, evaluation, statistics }) {
  if (!sae.layers?.length) return [["language model", short(sae.lm), sae.lm]];
  const layers = sae.layers.length > 6 ? `${sae.layers[0]}–${sae.layers.at(-1)} (${sae.layers.length})` : sae.layers.join(", ");
  return [
    ["language model", short(sae.lm), sae.lm], ["latents", num(sae.n_latents), `${num(sae.expansion_factor)} × d_model`], ["active at once (k)", num(sae.k)],
    ["d_model", num(sae.d_model)], ["layers", layers], ["groups", num(sae.groups), "dictionaries the layers share"], ["input frame", sae.lens ? `${sae.frame}, tuned lens` : sae.frame], ["recipe", sae.recipe],
    ["ever active", statistics && `${num(statistics.n_alive)} (${percent(statistics.n_alive / sae.n_latents)})`],
    ["tokens analysed", statistics && num(statistics.n_tokens)],
    ["FVU, mean of layers", evaluation?.mean?.fvu ?? null], ["ΔCE, all layers replaced", evaluation?.all_layers?.delta_ce ?? null, "nats"],
    ["KL, all layers replaced", evaluation?.all_layers?.kl ?? null, "nats"], ["cross-entropy, clean", evaluation?.clean_ce ?? null, "nats"],
  ];
}

function Quality({ evaluation, layers }) {
  const known = QUALITY.filter(([key]) => evaluation.layers.some((row) => row[key] !== undefined && row[key] !== null));
  const columns = [{ key: "layer", title: "layer", left: true, cell: (r) => r.layer },
    ...known.map(([key, title, hint]) => ({ key, title, hint, cell: (r) => html`<${Value} of=${r[key] ?? null} />` }))];
  const rows = [...[...evaluation.layers].reverse(), ...(evaluation.mean ? [{ ...evaluation.mean, layer: "mean", isTotal: true }] : [])];
  const charts = useMemo(() => known.slice(0, 4).map(([key, name, hint]) => {
    const points = evaluation.layers.map((r) => ({ layer: r.layer, value: valueOf(r[key]), ...interval(r[key]) }));
    return [key, name, hint, layerLine(layers, points, name), () => [["layer", key], ...points.map((p) => [p.layer, p.value])]];
  }), [evaluation]);
  return html`<section aria-labelledby="quality"><h2 id="quality">Reconstruction by layer <span class="soft small">${num(evaluation.n_tokens)} held-out tokens</span></h2>
    <div class="four">${charts.map(([key, name, hint, draw, csv]) => html`<${Figure} key=${key} title=${name} about=${hint} name=${`quality-${key}`} csv=${csv}><${Chart} draw=${draw} label=${`${name} by layer`} /><//>`)}</div>
    <${Table} wide=${true} label="Reconstruction by layer" columns=${columns} rows=${rows} />
  </section>`;
}

function interval(x) {
  const ci = intervalOf(x);
  return ci ? { lo: ci[0], hi: ci[1] } : {};
}

function Depth({ statistics, nLayers }) {
  const { centre_of_mass: centre, effective_layers: spread } = statistics.histograms;
  const height = Math.max(220, Math.min(360, nLayers * 14));
  const draws = useMemo(() => [centre && histogram(centre, "centre of mass, layer", { upright: true, height }), spread && histogram(spread, "effective layers", { height })], [statistics]);
  const csv = ({ edges, counts }) => () => [["from", "to", "latents"], ...counts.map((n, i) => [edges[i], edges[i + 1], n])];
  const weights = Object.entries(statistics.decomposition ?? {}).filter(([, row]) => row && typeof row === "object");
  const parts = ["within", "token", "latent", "total", "rel_f", "rel_t"];
  const nulls = Object.entries(statistics.nulls ?? {});
  const rows = weights.flatMap(([weight, row]) => [{ name: weight, ...row }, ...nulls.filter(([, n]) => n?.decomposition?.[weight]).map(([name, n]) => ({ name: `${weight}, if depth were chance: ${name.replaceAll("_", " ")}`, ...n.decomposition[weight] }))]);
  return html`<section aria-labelledby="depth"><h2 id="depth">Where latents live</h2>
    <div class="two">
      ${centre && html`<${Figure} title="Centre of mass" about="of each latent's activity over layers" name="centre-of-mass" csv=${csv(centre)}><${Chart} draw=${draws[0]} label="Histogram of the centre of mass" /><//>`}
      ${spread && html`<${Figure} title="Effective layers" about="exp of the entropy of P(layer | latent)" name="effective-layers" csv=${csv(spread)}><${Chart} draw=${draws[1]} label="Histogram of effective layers" /><//>`}
    </div>
    ${rows.length > 0 && html`<h3>Variance of depth: within a token's layers, between tokens, between latents</h3><${Table} label="Decomposition of the variance of depth"
      columns=${[{ key: "name", title: "weight", left: true, cell: (r) => r.name }, ...parts.map((key) => ({ key, title: key.replace("_", " "), cell: (r) => html`<${Value} of=${r[key] ?? null} />` }))]} rows=${rows} />`}
  </section>`;
}

function Similarity({ similarity, layers }) {
  const kinds = Object.entries(similarity).filter(([, s]) => Array.isArray(s?.mean) && s.mean.length === layers.length - 1 && s.mean.length > 0);
  const charts = useMemo(() => kinds.map(([kind, s]) => {
    const points = s.mean.map((value, i) => ({ layer: layers[i + 1], name: `${layers[i]} to ${layers[i + 1]}`, value, ...(s.sem?.[i] != null ? { lo: value - 1.96 * s.sem[i], hi: value + 1.96 * s.sem[i] } : {}) }));
    return [kind, layerLine(layers, points, "cosine", { zero: false }), () => [["layer", "next_layer", "mean", "sem"], ...s.mean.map((v, i) => [layers[i], layers[i + 1], v, s.sem?.[i]])]];
  }), [similarity]);
  if (!charts.length) return null;
  return html`<section aria-labelledby="similar"><h2 id="similar">Similarity of adjacent layers</h2><div class="two">
    ${charts.map(([kind, draw, csv]) => html`<${Figure} key=${kind} title=${kind === "centred" ? "Centred" : "Raw"} about="mean cosine of the residual stream at a layer and at the layer below" name=${`similarity-${kind}`} csv=${csv}><${Chart} draw=${draw} label="Similarity of adjacent layers" /><//>`)}
  </div></section>`;
}

/** The page. */
export function Page({ data }) {
  const query = useQuery();
  const rows = useRef(null);
  const { sae, evaluation, statistics, similarity, training } = data;
  return html`<div class="body">
    <${Facts} rows=${sae ? facts(data) : []} />
    ${training && !training.finished && html`<${Training} />`}
    ${statistics && sae && html`<section aria-labelledby="map"><h2 id="map">Latents by layer</h2>
      <${Figure} title="P(layer | latent)" about=${html`each column a latent, or the mean of its neighbours${" "}<${Scale} from="0" to="1, colour by square root" />`} name="heatmap" csv=${() => rows.current()}><${Heatmap} layers=${sae.layers} query=${query} rows=${rows} /><//></section>`}
    ${statistics && sae && html`<${Depth} statistics=${statistics} nLayers=${sae.layers.length} />`}
    ${evaluation ? html`<${Quality} evaluation=${evaluation} layers=${sae.layers} />` : html`<${Empty}>No evaluation yet: quality by layer appears here once it is measured.<//>`}
    ${similarity && sae && html`<${Similarity} similarity=${similarity} layers=${sae.layers} />`}
    ${training?.finished && html`<${Training} />`}</div>`;
}
