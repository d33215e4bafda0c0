// Training curves; they grow while the run is going.
import { html, useEffect, useMemo, useState } from "../vendor/preact-htm.module.js";
import { ask } from "./api.js";
import { Chart, curve } from "./charts.js";
import { Figure } from "./figure.js";
import { num } from "./format.js";
import { Empty, Failure } from "./status.js";

const CURVES = [["loss", "loss"], ["fvu", "FVU"], ["dead_fraction", "dead latents, share"], ["tokens_per_second", "tokens per second"]];
const EVERY_MS = 2000;
const MOST_POINTS = 4000;

function usePoints() {
  const [state, set] = useState({ points: [], running: null, total_steps: null, error: null });
  useEffect(() => {
    let timer = 0;
    let last = 0;
    const controller = new AbortController();
    const look = async () => {
      try {
        const found = await ask(`/training.json?since_step=${last}`, { signal: controller.signal });
        const fresh = found.points.filter((p) => p.step > last);
        last = Math.max(last, ...fresh.map((p) => p.step));
        set((old) => ({ ...found, error: null, points: thinned([...old.points, ...fresh]) }));
        if (found.running) timer = setTimeout(look, EVERY_MS);
      } catch (error) {
        if (error.name !== "AbortError") set((old) => ({ ...old, error }));
      }
    };
    look();
    return () => {
      controller.abort();
      clearTimeout(timer);
    };
  }, []);
  return state;
}

const thinned = (points) => (points.length > MOST_POINTS ? points.filter((_, i) => i % 2 === 0 || i === points.length - 1) : points);

/** The curves of the run's metrics. */
export function Training() {
  const { points, running, total_steps: total, error } = usePoints();
  const draws = useMemo(() => CURVES.map(([key, name]) => [key, name, curve(points, key, name)]), [points]);
  const last = points.at(-1);
  const csv = () => [["step", "tokens", ...CURVES.map(([key]) => key)], ...points.map((p) => [p.step, p.tokens, ...CURVES.map(([key]) => p[key])])];
  return html`<section aria-labelledby="training"><h2 id="training">Training${" "}<span class="soft small" role="status">${last && `${running ? "running: " : ""}step ${num(last.step)}${total ? ` of ${num(total)}` : ""}, ${num(last.tokens)} tokens`}</span></h2>
    ${error && html`<${Failure} error=${error} />`}
    ${running !== null && !points.length && html`<${Empty}>${running ? "The run has written no metrics yet." : "This SAE came without training metrics."}<//>`}
    <div class="four">${points.length > 0 && draws.map(([key, name, draw]) => html`<${Figure} key=${key} title=${name} name=${`training-${key}`} csv=${csv}><${Chart} draw=${draw} label=${`${name} over tokens`} /><//>`)}</div>
  </section>`;
}
