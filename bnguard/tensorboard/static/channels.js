// The channels of one layer at one step: shift, variance ratio, gamma and beta; training next to
// evaluation, dead channels marked.

import { counted, h } from "./dom.js";
import { nearest } from "./overview.js";
import { Plot, spanOf } from "./plot.js";
import { amount, factor, figure, valueText } from "./scale.js";

// A smaller gamma than this lets nothing through.
const CLOSED_GAMMA = 1e-3;

/** Return the snapshot of a layer nearest to a step, by row: `{step, count, gamma, …}`. */
export function snapshotAt(series, step) {
  const place = nearest(series.steps, step);
  const [, rows, count] = series.shape;
  const snapshot = { step: series.steps[place], count };
  series.names.forEach((name, row) => {
    const start = (place * rows + row) * count;
    snapshot[name] = series.values.subarray(start, start + count);
  });
  return snapshot;
}

/** The card of a layer's channels; a click calls `onPick(channel)`. */
export class Channels {
  #onPick;
  #text = h("p", { class: "about" });
  #readout = h("p", { class: "readout", "aria-live": "polite" });
  #charts = h("div", { class: "channel-charts" });
  #snapshot = null;
  #chosen = null;
  #shown = null;
  #zoom = null;
  #plots = {};
  element = h("div", { class: "channels" }, this.#text, this.#charts, this.#readout);

  constructor(onPick) {
    this.#onPick = onPick;
    this.#plots = {
      shift: this.#plot(),
      ratio: this.#plot(),
      affine: this.#plot(),
    };
    this.#charts.append(
      chart("Shift of the mean, σ", [["training", "in training"], ["evaluation", "in evaluation"]], this.#plots.shift),
      chart("Running variance, as a factor", [["training", "in training"], ["evaluation", "in evaluation"]], this.#plots.ratio),
      chart("Gamma and beta", [["running", "gamma"], ["beta", "beta"]], this.#plots.affine),
    );
  }

  /** Show a snapshot; `metrics` of the run tell the limits. */
  show(snapshot, metrics, chosen) {
    this.#shown = [snapshot, metrics, chosen];
    if (this.#snapshot?.count !== snapshot.count) this.#zoom = null;
    this.#snapshot = snapshot;
    this.#chosen = chosen;
    const { count } = snapshot;
    const xs = Float32Array.from({ length: count }, (_, channel) => channel);
    const dead = channelsWhere(snapshot.is_dead, (value) => value > 0);
    const closed = channelsWhere(snapshot.gamma, (value) => Math.abs(value) < CLOSED_GAMMA);
    this.#text.textContent = summary(snapshot, dead, closed);
    const size = count > 600 ? 1.1 : count > 150 ? 1.7 : 2.6;
    const both = (batch, evaluation) => [
      { style: "dots", colour: "training", xs, ys: batch, size },
      { style: "dots", colour: "evaluation", xs, ys: evaluation, size },
    ];
    const shared = {
      xs,
      bands: [...dead.map((at) => ({ at, colour: "dead" })), ...closed.map((at) => ({ at, colour: "closed" }))],
    };
    const limit = (key) => metrics.find((metric) => metric.key === key)?.limit ?? null;
    this.#draw("shift", shared, both(snapshot.batch_shift_std, snapshot.eval_shift_std), limit("eval_shift_std"));
    this.#draw(
      "ratio",
      shared,
      both(snapshot.batch_log_variance_ratio, snapshot.eval_log_variance_ratio),
      limit("eval_log_variance_ratio"),
    );
    const affine = [
      { style: "stems", colour: "running", xs, ys: snapshot.gamma },
      { style: "dots", colour: "beta", xs, ys: snapshot.beta, size },
    ];
    this.#draw("affine", shared, affine, null);
    this.#read(chosen);
  }

  #plot() {
    return new Plot({
      height: 140,
      onPick: (x) => {
        const channel = Math.round(x);
        this.#onPick(channel === this.#chosen ? null : channel);
      },
      onHover: (x) => this.#read(x === null ? this.#chosen : Math.round(x)),
      onZoom: (zoom) => {
        this.#zoom = zoom;
        this.show(...this.#shown);
      },
      onMove: (by) => {
        const { count } = this.#snapshot;
        this.#onPick(this.#chosen === null ? 0 : (this.#chosen + by + count) % count);
      },
    });
  }

  #draw(name, { xs, bands }, series, limit) {
    const isFactor = name === "ratio";
    const y = { ...spanOf(...series.map(({ ys }) => ys ?? []), [0]), isFactor };
    const label = `limit ${isFactor ? factor(limit) : `±${figure(limit)} σ`}`;
    const limits =
      limit === null
        ? []
        : [
            { value: limit, label, side: "above" },
            { value: -limit, label, side: "below", isMirrored: true },
          ];
    const { min, max } = this.#zoom ?? { min: -Infinity, max: Infinity };
    const x = { min: Math.max(min, -0.5), max: Math.min(max, xs.length - 0.5), label: "channel", whole: true };
    const described = `${name} of ${xs.length} channels, from ${figure(y.min)} to ${figure(y.max)}`;
    this.#plots[name].draw({ x, y, series, limits, bands, cursor: this.#chosen }, described);
  }

  #read(channel) {
    const snapshot = this.#snapshot;
    if (channel === null || !snapshot || channel < 0 || channel >= snapshot.count) {
      this.#readout.textContent = "Click a channel, or use ← → in a chart, to see what the layer does to it.";
      return;
    }
    const at = (row, unit = "") => amount(snapshot[row]?.[channel], unit);
    const ratio = (key) => valueText({ key, unit: "" }, snapshot[key]?.[channel]);
    this.#readout.textContent =
      `Channel ${channel}: shift in training ${at("batch_shift_std", "σ")}, in evaluation ` +
      `${at("eval_shift_std", "σ")}; running variance ${ratio("batch_log_variance_ratio")} and ` +
      `${ratio("eval_log_variance_ratio")}; running mean ${at("running_mean")}, deviation ` +
      `${at("running_std")}; gamma ${at("gamma")}, beta ${at("beta")}` +
      (snapshot.is_dead?.[channel] > 0 ? "; dead: it has no variance" : "");
  }
}

function chart(title, keys, plot) {
  const legend = keys.map(([colour, text]) =>
    h("span", { class: "key" }, h("span", { class: `dot ${colour}` }), text),
  );
  return h("figure", { class: "chart" }, h("h3", {}, title), h("div", { class: "series" }, legend), plot.element);
}

function channelsWhere(values, test) {
  return values ? [...values.keys()].filter((channel) => test(values[channel])) : [];
}

function summary({ step, count }, dead, closed) {
  const parts = [`${counted(count, "channel")} at step ${step.toLocaleString("en")}`];
  if (dead.length) parts.push(`${dead.length} dead (no variance), shaded grey`);
  if (closed.length) parts.push(`${closed.length} closed (gamma is 0), shaded yellow`);
  return `${parts.join("; ")}.`;
}
