// One layer: its curves, what it does to the signal, its channels.

import { Channels, snapshotAt } from "./channels.js";
import { Curves } from "./curves.js";
import { copyButton, h, layerName } from "./dom.js";
import { Signal } from "./signal.js";

/** The card of the chosen layer; a click changes `choice`. */
export class LayerView {
  #name = h("h2", { id: "layer-title" });
  #kind = h("span", { class: "muted" });
  #step = h("span", { class: "step", "aria-live": "polite" });
  #newest = h("button", { class: "quiet", type: "button" }, "Newest");
  #copy = h("span");
  #curves;
  #channels;
  #signal = new Signal();
  #absent = h("p", { class: "muted" });
  #snapshots = h("div", { class: "snapshots" });
  #metrics = [];
  #series = null;

  constructor(choice, onStep) {
    this.#curves = new Curves((step) => choice.set({ step }));
    this.#channels = new Channels((channel) => choice.set({ channel }));
    this.#newest.addEventListener("click", () => choice.set({ step: null }));
    const stepper = h(
      "div",
      { class: "stepper", role: "group", "aria-label": "Step" },
      h("button", { type: "button", "aria-label": "Earlier step", onclick: () => onStep(-1) }, "‹"),
      this.#step,
      h("button", { type: "button", "aria-label": "Later step", onclick: () => onStep(1) }, "›"),
      this.#newest,
    );
    this.#snapshots.append(
      h("h3", { class: "part" }, "What the layer does to the signal"),
      this.#signal.element,
      h("h3", { class: "part" }, "Channels"),
      this.#channels.element,
    );
    this.element = h(
      "section",
      { class: "card layer", "aria-labelledby": "layer-title" },
      h("header", {}, h("div", { class: "layer-name" }, this.#name, this.#kind, this.#copy), stepper),
      this.#curves.element,
      this.#absent,
      this.#snapshots,
    );
  }

  /** Show the curves of a layer: `entries` are `{run, series}`, one for each run. */
  showCurves(name, entries, step) {
    const { run } = entries[0];
    this.#metrics = run.metrics;
    this.#name.textContent = layerName(name);
    this.#kind.textContent = layerName(run.kinds[run.layers.indexOf(name)] ?? " ", 60);
    this.#copy.replaceChildren(copyButton(() => layerName(name), "Copy the layer's name", "Copy name"));
    this.#curves.show(entries, step);
  }

  /** Show the channels of the layer; `series` is null if no snapshot was logged. */
  showChannels(series, step, channel) {
    this.#series = series;
    this.#snapshots.hidden = series === null;
    this.#absent.hidden = series !== null;
    this.#absent.textContent =
      "No snapshot of this layer's channels was logged; one is written now and then, and when a finding fires.";
    this.#updateChannels(step, channel);
  }

  /** Show another step or channel of what is shown already. */
  update(step, channel, isNewest) {
    this.#step.textContent = `step ${Math.round(step).toLocaleString("en")}`;
    this.#newest.disabled = isNewest;
    this.#curves.update(step);
    this.#updateChannels(step, channel);
  }

  #updateChannels(step, channel) {
    if (!this.#series) return;
    const snapshot = snapshotAt(this.#series, step);
    const chosen = channel !== null && channel >= 0 && channel < snapshot.count ? channel : null;
    this.#channels.show(snapshot, this.#metrics, chosen);
    this.#signal.show(snapshot, chosen);
  }
}
