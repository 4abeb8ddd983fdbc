// The curves of one layer: metrics that belong together in one chart, of one run or of two.

import { h, layerName } from "./dom.js";
import { nearest } from "./overview.js";
import { Plot, spanOf } from "./plot.js";
import { isFactor, isOver, limitText, valueText } from "./scale.js";

const DASHES = [[], [5, 3]];

/** The charts of a layer; a click calls `onPick(step)`. */
export class Curves {
  #onPick;
  #charts = [];
  #step = null;
  #zoom = null;
  element = h("div", { class: "curves" });

  constructor(onPick) {
    this.#onPick = onPick;
  }

  /** Show `entries`: `{run, series}` of the layer, one for each run. */
  show(entries, step) {
    const { metrics } = entries[0].run;
    const panels = Map.groupBy(metrics, ({ panel, name }) => panel || name);
    this.#zoom = null;
    const onZoom = (zoom) => {
      this.#zoom = zoom;
      this.update(this.#step);
    };
    this.#charts = [...panels]
      .map(([title, members]) => new Chart(title, members, entries, this.#onPick, onZoom))
      .filter((chart) => chart.isObserved);
    this.element.replaceChildren(...this.#charts.map((chart) => chart.element));
    this.update(step);
  }

  /** Rule the chosen step, and write the values there. */
  update(step) {
    this.#step = step;
    for (const chart of this.#charts) chart.draw(step, this.#zoom);
  }
}

/** One chart: the metrics of a panel. */
class Chart {
  #step = null;
  #lines;
  #limits;
  #title;
  #isConstant;
  #legend = h("div", { class: "series" });
  #plot;

  constructor(title, metrics, entries, onPick, onZoom) {
    this.#title = title;
    this.#lines = entries.flatMap(({ run, series }, place) =>
      metrics.map((metric) => lineOf(metric, run, series, place, entries.length > 1)),
    );
    this.#lines = this.#lines.filter((line) => line && line.ys.some((y) => !Number.isNaN(y)));
    this.#limits = limitsOf(metrics);
    this.#plot = new Plot({
      height: 124,
      onPick: (x) => onPick(this.#nearestStep(x)),
      onHover: (x) => this.#write(x === null ? this.#step : x),
      onZoom,
    });
    // What never changes needs no picture.
    this.#isConstant = this.#lines.every(({ ys }) => new Set(ys.filter((y) => !Number.isNaN(y))).size === 1);
    const body = this.#isConstant ? h("span", { class: "muted" }, "the same in every step") : this.#plot.element;
    const kind = this.#isConstant ? "constant" : "chart";
    this.element = h("figure", { class: kind }, h("h3", {}, title), this.#legend, body);
  }

  get isObserved() {
    return this.#lines.length > 0;
  }

  /** Draw the chart with a step chosen. */
  draw(step, zoom) {
    this.#step = step;
    this.#write(step);
    if (this.#isConstant) return;
    const lines = this.#lines;
    const ends = lines.map(({ xs }) => [xs[0], xs[xs.length - 1]]).flat();
    const all = { min: Math.min(...ends), max: Math.max(...ends) };
    const inside = zoom && { min: Math.max(zoom.min, all.min), max: Math.min(zoom.max, all.max) };
    const x = { ...(inside ?? all), label: "step", whole: true };
    const y = { ...this.#span(x), isFactor: lines.every(({ metric }) => isFactor(metric)) };
    const limits = this.#limits;
    const series = lines.map(({ xs, ys, colour, dash }) => ({ style: "line", xs, ys, colour, dash }));
    this.#plot.draw({ x, y, series, limits, cursor: step }, this.#description(step));
  }

  /** Return the span of y within a span of x: with the limit, where the curve comes near it. */
  #span({ min, max }) {
    const span = spanOf(...this.#lines.map(({ xs, ys }) => ys.filter((_, i) => xs[i] >= min && xs[i] <= max)));
    for (const { value } of this.#limits) {
      if (value > span.max && value < 4 * span.max) span.max = value * 1.15;
      if (value < span.min && (value > 0 || value > 4 * span.min)) span.min = Math.min(value * 1.15, 0);
    }
    return span;
  }

  #nearestStep(x) {
    const { xs } = this.#lines[0];
    return xs[nearest(xs, x)];
  }

  #write(step) {
    const keys = this.#lines.map(({ metric, name, xs, ys, colour, dash }) => {
      const value = ys[nearest(xs, step)];
      const over = isOver(metric, value);
      return h(
        "span",
        { class: "key", title: metric.description },
        h("span", { class: `stroke ${colour} ${dash.length ? "dashed" : ""}` }),
        `${name} `,
        h("strong", { class: over ? "over" : "" }, `${over ? "▲ " : ""}${valueText(metric, value)}`),
      );
    });
    this.#legend.replaceChildren(...keys);
  }

  #description(step) {
    const values = this.#lines.map(
      ({ metric, name, xs, ys }) => `${name} ${valueText(metric, ys[nearest(xs, step)])}`,
    );
    const limits = this.#limits.map(({ label }) => label).join(", ");
    return `${this.#title} at step ${Math.round(step)}: ${values.join(", ")}. ${limits}`;
  }
}

function lineOf(metric, run, series, place, isCompared) {
  const row = run.metrics.findIndex(({ key }) => key === metric.key);
  if (row < 0) return null;
  const [count, rows] = series.shape;
  const ys = Float32Array.from({ length: count }, (_, i) => series.values[i * rows + row]);
  const name = isCompared ? `${"AB"[place]} ${metric.name}` : metric.name;
  return { metric, name: layerName(name, 60), xs: series.steps, ys, colour: role(metric.key), dash: DASHES[place] };
}

/** Return what a number is of: the colour is the same in every chart. */
function role(key) {
  if (key.startsWith("eval")) return "evaluation";
  return key.startsWith("running") ? "running" : "training";
}

/** Return the limits of a chart's metrics, each once, on both sides where both count. */
function limitsOf(metrics) {
  const limits = new Map();
  for (const metric of metrics) {
    const { limit, limit_side: side } = metric;
    if (limit === null) continue;
    limits.set(limit, { value: limit, label: limitText(metric), side });
    if (side === "either") limits.set(-limit, { value: -limit, label: limitText(metric), side: "below", isMirrored: true });
  }
  return [...limits.values()];
}
