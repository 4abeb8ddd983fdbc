// What the layer does to the signal: the distribution before and after normalisation, from moments,
// with batch statistics and with running statistics one over the other.

import { h } from "./dom.js";
import { Plot } from "./plot.js";
import { figure } from "./scale.js";

const POINTS = 241;

/** The two pictures, and in words how far evaluation is from training. */
export class Signal {
  #verdict = h("p", { class: "verdict" });
  #before = new Plot({ height: 150 });
  #after = new Plot({ height: 150 });
  #legends = [h("div", { class: "series" }), h("div", { class: "series" })];
  element = h(
    "div",
    { class: "signal" },
    this.#verdict,
    h(
      "div",
      { class: "pair" },
      h("figure", { class: "chart" }, h("h3", {}, "Inputs"), this.#legends[0], this.#before.element),
      h("figure", { class: "chart" }, h("h3", {}, "What leaves the layer"), this.#legends[1], this.#after.element),
    ),
    h(
      "p",
      { class: "about" },
      "Normal curves with the measured mean and variance of each channel, added up; the true shape is not recorded.",
    ),
  );

  /** Show a snapshot: all channels, or the one chosen. */
  show(snapshot, channel) {
    const channels = channel === null ? [...Array(snapshot.count).keys()] : [channel];
    const parts = channels.map((place) => signalOf(snapshot, place)).filter(Boolean);
    const of = channel === null ? "all channels" : `channel ${channel}`;
    this.#verdict.textContent = verdict(parts, channel);
    this.#draw(0, this.#before, `inputs, ${of}`, [
      curve("training batch", "training", "area", parts.map(({ batch }) => batch)),
      curve("evaluation", "evaluation", "area", parts.map(({ evaluation }) => evaluation)),
      curve("running statistics", "running", "line", parts.map(({ running }) => running)),
    ]);
    this.#draw(1, this.#after, `what leaves, ${of}`, [
      curve("batch statistics (training)", "training", "area", parts.map(({ trained }) => trained)),
      curve("running statistics, same batch", "running", "line", parts.map(({ rerun }) => rerun)),
      curve("running statistics (evaluation)", "evaluation", "area", parts.map(({ evaluated }) => evaluated)),
    ]);
  }

  #draw(place, plot, what, curves) {
    const known = curves.filter(({ normals }) => normals.length);
    const legend = known.map(({ name, colour }) =>
      h("span", { class: "key" }, h("span", { class: `stroke ${colour} ${colour === "running" ? "dashed" : ""}` }), name),
    );
    this.#legends[place].replaceChildren(...legend);
    const span = reach(known.flatMap(({ normals }) => normals));
    const xs = Float64Array.from({ length: POINTS }, (_, i) => span.min + ((span.max - span.min) * i) / (POINTS - 1));
    const series = known.map(({ style, colour, normals }) => ({
      style,
      colour,
      xs,
      ys: density(xs, normals),
      dash: style === "line" ? [5, 3] : [],
    }));
    // A sharp peak, of a channel with hardly any variance, must not flatten all else.
    const tops = series.map(({ ys }) => Math.max(...ys)).sort((a, b) => a - b);
    const top = Math.min(tops[tops.length - 1] ?? 1, 3 * (tops[0] ?? 1));
    const described = `${what}: ${known.map(({ name, normals }) => `${name} ${inWords(normals)}`).join("; ")}`;
    plot.draw({ x: { ...span, label: "value" }, y: { min: 0, max: 1.06 * top || 1 }, series }, described);
  }
}

/** Return the normal curves of one channel as [mean, deviation]; null if it is not finite. */
function signalOf(snapshot, channel) {
  const at = (row) => snapshot[row]?.[channel] ?? NaN;
  const [mean, deviation, gamma, beta] = [at("running_mean"), at("running_std"), at("gamma"), at("beta")];
  const scale = Math.abs(gamma);
  const input = (shift, ratio) => [mean + shift * deviation, deviation * Math.exp(ratio / 2)];
  const output = (shift, ratio) => [beta + gamma * shift, scale * Math.exp(ratio / 2)];
  const batch = [at("batch_shift_std"), at("batch_log_variance_ratio")];
  const evaluation = [at("eval_shift_std"), at("eval_log_variance_ratio")];
  if (![mean, deviation, gamma, beta].every(Number.isFinite)) return null;
  return {
    running: [mean, deviation],
    batch: input(...batch),
    evaluation: input(...evaluation),
    trained: [beta, scale],
    rerun: output(...batch),
    evaluated: output(...evaluation),
    // In units in which training always gives mean 0 and deviation 1.
    gap: Number.isFinite(evaluation[0] + evaluation[1]) ? evaluation : batch,
    isEvaluated: Number.isFinite(evaluation[0] + evaluation[1]),
  };
}

function curve(name, colour, style, normals) {
  const known = normals.filter(([mean, deviation]) => Number.isFinite(mean) && deviation > 0);
  return { name, colour, style, normals: known };
}

function density(xs, normals) {
  const ys = new Float64Array(xs.length);
  for (const [mean, deviation] of normals) {
    const height = 1 / (deviation * Math.sqrt(2 * Math.PI) * normals.length);
    for (let i = 0; i < xs.length; i += 1) {
      const z = (xs[i] - mean) / deviation;
      if (z > -6 && z < 6) ys[i] += height * Math.exp(-0.5 * z * z);
    }
  }
  return ys;
}

/** Return the span that holds nearly all of the curves: a few odd channels may lie outside of it. */
function reach(normals) {
  if (!normals.length) return { min: -1, max: 1 };
  const lows = normals.map(([mean, deviation]) => mean - 3 * deviation).sort((a, b) => a - b);
  const highs = normals.map(([mean, deviation]) => mean + 3 * deviation).sort((a, b) => a - b);
  const low = lows[Math.floor(0.02 * (lows.length - 1))];
  const high = highs[Math.ceil(0.98 * (highs.length - 1))];
  return low < high ? { min: low, max: high } : { min: low - 1, max: high + 1 };
}

function verdict(parts, channel) {
  if (!parts.length) return "The statistics are not finite: evaluation gives NaN.";
  const shares = parts.map(({ gap }) => overlap(...gap)).filter(Number.isFinite);
  if (!shares.length) return "";
  const mean = shares.reduce((sum, share) => sum + share, 0) / shares.length;
  const who = channel === null ? "On average over the channels, " : `In channel ${channel}, `;
  const what = parts.some(({ isEvaluated }) => isEvaluated)
    ? "evaluation gives the next layer"
    : "the running statistics would give the next layer";
  const tone =
    mean > 0.9
      ? "training and evaluation agree."
      : mean > 0.7
        ? "the two modes differ visibly."
        : "the next layer gets another signal in evaluation than the one it was trained on.";
  return `${who}${what} a distribution that overlaps by ${Math.round(100 * mean)} % with that of training: ${tone}`;
}

/** Return how much N(shift, e^ratio) and N(0, 1) have in common: 1 where they are equal. */
function overlap(shift, ratio) {
  const deviation = Math.exp(ratio / 2);
  if (!Number.isFinite(shift) || !Number.isFinite(deviation) || deviation === 0) return NaN;
  const low = Math.min(-5, shift - 5 * deviation);
  const high = Math.max(5, shift + 5 * deviation);
  const step = (high - low) / 200;
  let sum = 0;
  for (let x = low; x <= high; x += step) {
    const first = Math.exp(-0.5 * x * x);
    const second = Math.exp(-0.5 * ((x - shift) / deviation) ** 2) / deviation;
    sum += Math.min(first, second) * step;
  }
  return Math.min(sum / Math.sqrt(2 * Math.PI), 1);
}

function inWords(normals) {
  const mean = normals.reduce((sum, [middle]) => sum + middle, 0) / normals.length;
  return `mean ${figure(mean)}`;
}
