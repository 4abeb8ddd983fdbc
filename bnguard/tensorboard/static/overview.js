// The overview: layers in forward order by steps, for one run or two, with names, values and legend.

import { h, layerName } from "./dom.js";
import { STRIP, Heatmap, severityIcon } from "./heatmap.js";
import { theme } from "./host.js";
import { MOST_TIMES_LIMIT, amount, closeness, isOver, legendColours, limitText, valueText } from "./scale.js";

const LABEL_HEIGHT = 13;
const TALLEST_ROW = 20;
const BEST_HEIGHT = 540;
const MOST_MARKS = 400;

/** The card with the picture; a click changes `choice`. */
export class Overview {
  #choice;
  #view = null;
  #title = h("h2", { id: "overview-title" });
  #about = h("p", { class: "about" });
  #legend = h("div", { class: "legend" });
  #names = h("ul", {
    class: "heat-names",
    role: "listbox",
    tabindex: 0,
    "aria-label": "Layers in forward order, with their values at the chosen step",
  });
  #grid = h("div", { class: "heat-grid" });
  #tip = h("div", { class: "tip", hidden: true, "aria-hidden": "true" });
  #panels = [0, 1].map((place) => this.#newPanel(place));
  #rowHeight = 10;

  constructor(choice) {
    this.#choice = choice;
    this.element = h(
      "section",
      { class: "card overview", "aria-labelledby": "overview-title" },
      h("header", {}, h("div", {}, this.#title, this.#about), this.#legend),
      this.#grid,
      howToRead(),
      this.#tip,
    );
    this.#names.addEventListener("click", (event) => {
      const row = event.target.closest("li")?.dataset.row;
      if (row !== undefined) this.#pick(Number(row));
    });
  }

  /** Show `{runs: [{run, series}], metric}`; the second run is there to compare. */
  show({ runs, metric }) {
    const layers = [...new Set(runs.flatMap(({ run }) => run.layers))];
    const first = Math.min(...runs.map(({ run }) => run.first_step));
    const last = Math.max(...runs.map(({ run }) => run.last_step));
    const largest = Math.max(...runs.map(({ run }) => Number(ownMetric(run, metric).largest ?? 0)));
    this.#view = { runs, layers, first, last, metric: { ...metric, largest } };
    this.#rowHeight = Math.max(3, Math.min(TALLEST_ROW, Math.floor(BEST_HEIGHT / layers.length)));
    this.#title.textContent = metric.name;
    this.#about.textContent = metric.description;
    this.#legend.replaceChildren(...legend(this.#view));
    this.#names.replaceChildren(...layers.map((name, row) => this.#nameItem(name, row)));
    const parts = runs.map((entry, place) => {
      this.#showPanel(entry, place);
      return this.#panels[place].parts;
    });
    const isCompared = runs.length > 1;
    this.#grid.classList.toggle("compared", isCompared);
    this.#grid.replaceChildren(this.#names, ...parts.flat());
    this.update();
  }

  /** Show what is chosen: the layer's row, the step, and the values there. */
  update() {
    if (!this.#view) return;
    const { layers, runs, last } = this.#view;
    const { layer, step } = this.#choice.now;
    const row = layers.indexOf(layer);
    const at = step ?? last;
    const values = runs.map(({ run, series }) => valuesAt(run, series, layers, at));
    runs.forEach((_, place) => {
      this.#panels[place].heatmap.choose(row, at);
      this.#showValues(place, values[place]);
    });
    this.#showNames(row, values, at);
  }

  /** Draw again, in the colours of the theme. */
  repaint() {
    if (!this.#view) return;
    this.#legend.replaceChildren(...legend(this.#view));
    this.#panels.forEach(({ heatmap }) => heatmap.paint());
  }

  #newPanel(place) {
    const heatmap = new Heatmap({
      onPick: ({ row, step }) => this.#pick(row, this.#loggedStep(step, place)),
      onHover: (at, event) => this.#hover(at, event, place),
      onMark: (finding) => this.onFinding(finding),
    });
    const title = h("div", { class: "heat-run" });
    const values = h("div", { class: "heat-values", "aria-hidden": "true" });
    const parts = [h("div", { class: "heat-panel" }, title, heatmap.element), values];
    return { heatmap, title, values, parts };
  }

  /** Called when a finding's mark is clicked; the page sets it. */
  onFinding = () => {};

  #showPanel({ run, series }, place) {
    const { layers, runs, metric, first, last } = this.#view;
    const panel = this.#panels[place];
    panel.title.textContent = runs.length > 1 ? `${"AB"[place]}  ${layerName(run.name, 60)}` : "";
    const places = new Map(run.layers.map((name, column) => [name, column]));
    const columns = layers.map((name) => places.get(name) ?? -1);
    const groups = layers
      .map((_, row) => row)
      .filter((row) => row > 0 && stage(layers[row]) !== stage(layers[row - 1]));
    const data = { series, metric, columns, first, last, groups, marks: marksOf(run, layers) };
    panel.heatmap.show(data, this.#rowHeight);
  }

  #nameItem(name, row) {
    const item = h(
      "li",
      { role: "option", id: `layer-${row}`, "data-row": row, title: layerName(name) },
      layerName(name, 48),
    );
    item.style.top = `${STRIP + (row + 0.5) * this.#rowHeight}px`;
    return item;
  }

  #showNames(chosen, values, step) {
    const { layers, metric } = this.#view;
    const isShown = this.#readable(chosen, values[0]);
    this.#names.style.height = `${STRIP + layers.length * this.#rowHeight}px`;
    for (const [row, item] of [...this.#names.children].entries()) {
      const texts = values.map((of) => inWords(metric, of[row]));
      item.setAttribute("aria-label", `${layerName(layers[row])}: ${texts.join(", ")}`);
      item.setAttribute("aria-selected", row === chosen);
      item.classList.toggle("faint", !isShown[row]);
      item.classList.toggle("over", isOver(metric, values[0][row]));
    }
    const label = `Layers in forward order; ${metric.name} at step ${Math.round(step)}`;
    this.#names.setAttribute("aria-label", label);
    if (chosen >= 0) this.#names.setAttribute("aria-activedescendant", `layer-${chosen}`);
  }

  #showValues(place, values) {
    const { metric } = this.#view;
    const isShown = this.#readable(this.#view.layers.indexOf(this.#choice.now.layer), values);
    const items = values.map((value, row) => {
      const over = isOver(metric, value);
      const item = h(
        "span",
        { class: over ? "over" : "" },
        `${over ? "▲ " : ""}${valueText({ ...metric, unit: "" }, value).replace("too ", "")}`,
      );
      item.style.top = `${STRIP + (row + 0.5) * this.#rowHeight}px`;
      return isShown[row] ? item : null;
    });
    this.#panels[place].values.replaceChildren(...items.filter(Boolean));
  }

  /** Return which rows have room for text: the chosen one, then the worst, then the others. */
  #readable(chosen, values) {
    const { layers, metric } = this.#view;
    const isShown = layers.map(() => this.#rowHeight >= LABEL_HEIGHT - 3);
    if (isShown[0]) return isShown;
    const close = closeness(metric, metric.largest);
    const badness = values.map((value) => (isOver(metric, value) ? close(value) : 0));
    const order = layers.map((_, row) => row).sort((a, b) => badness[b] - badness[a] || a - b);
    const room = Math.ceil(LABEL_HEIGHT / this.#rowHeight);
    for (const row of [chosen, ...order]) {
      if (row < 0) continue;
      const near = isShown.slice(Math.max(0, row - room + 1), row + room);
      if (!near.includes(true)) isShown[row] = true;
    }
    return isShown;
  }

  #pick(row, step = this.#choice.now.step) {
    this.#names.focus({ preventScroll: true });
    this.#choice.set({ layer: this.#view.layers[row], step, channel: null });
  }

  #loggedStep(step, place) {
    const { steps } = this.#view.runs[place].series;
    return steps[nearest(steps, step)];
  }

  #hover(at, event, place) {
    this.#tip.hidden = at === null;
    if (at === null) return;
    const { layers, metric, runs } = this.#view;
    const { run, series } = runs[place];
    const step = this.#loggedStep(at.step, place);
    const value = valuesAt(run, series, layers, step)[at.row];
    const verdict = isOver(metric, value) ? "over the limit" : "within the limit";
    this.#tip.replaceChildren(
      h("strong", {}, layerName(layers[at.row], 60)),
      h("span", {}, `step ${step.toLocaleString("en")}`),
      h("span", { class: isOver(metric, value) ? "over" : "" }, inWords(metric, value)),
      metric.limit === null || Number.isNaN(value)
        ? null
        : h("span", { class: "muted" }, `${verdict} (${limitText(metric)})`),
    );
    const box = this.element.getBoundingClientRect();
    const [x, y] = [event.clientX - box.left, event.clientY - box.top];
    const isRight = x > box.width - 240;
    this.#tip.style.transform = `translate(${x + (isRight ? -12 : 14)}px, ${y + 14}px) translateX(${isRight ? -100 : 0}%)`;
  }
}

/** Return the place of the logged step that is nearest to a step. */
export function nearest(steps, step) {
  let [low, high] = [0, steps.length - 1];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle] < step) low = middle + 1;
    else high = middle;
  }
  return low > 0 && step - steps[low - 1] <= steps[low] - step ? low - 1 : low;
}

/** Return the value of each layer at the logged step nearest to a step; NaN if there is none. */
export function valuesAt(run, series, layers, step) {
  const at = nearest(series.steps, step) * run.layers.length;
  const places = new Map(run.layers.map((name, column) => [name, column]));
  return layers.map((name) => (places.has(name) ? series.values[at + places.get(name)] : NaN));
}

function ownMetric(run, metric) {
  return run.metrics.find(({ key }) => key === metric.key) ?? metric;
}

function inWords(metric, value) {
  if (Number.isNaN(value)) return "not observed";
  return Number.isFinite(value) ? valueText(metric, value) : "not finite";
}

/** Return the stage of a network that a layer belongs to: the first part of its name. */
function stage(name) {
  return name.includes(".") ? name.slice(0, name.indexOf(".")) : "";
}

function marksOf(run, layers) {
  const rows = new Map(layers.map((name, row) => [name, row]));
  return run.findings.slice(0, MOST_MARKS).map((finding) => {
    return { finding, row: rows.get(finding.layer) ?? -1, step: finding.step ?? run.first_step };
  });
}

function legend({ metric, runs }) {
  const colours = legendColours(theme());
  const bar = (background, kind) => {
    const element = h("span", { class: `bar ${kind}` });
    element.style.background = background;
    return element;
  };
  const swatch = (background, text) => h("span", { class: "key" }, bar(background, "swatch"), text);
  const marked = new Set(runs.flatMap(({ run }) => run.findings.map(({ severity }) => severity)));
  const hasLimit = metric.limit !== null;
  const most = metric.limit === 0 ? amount(metric.largest, metric.unit) : `${MOST_TIMES_LIMIT}×`;
  const low = metric.limit_side === "below" ? "more" : "0";
  const high = metric.limit_side === "below" ? `1/${MOST_TIMES_LIMIT} of it` : most;
  const scale = hasLimit
    ? [
        h("span", { class: "end" }, low),
        bar(colours.within, "within"),
        h("span", { class: "at-limit" }, limitText(metric)),
        bar(colours.over, "beyond"),
        h("span", { class: "end" }, high),
      ]
    : [
        h("span", { class: "end" }, "0"),
        bar(colours.within, "within"),
        h("span", { class: "end" }, amount(metric.largest, metric.unit)),
        h("span", { class: "muted" }, "no rule sets a limit"),
      ];
  return [
    h("div", { class: "scale" }, scale),
    h(
      "div",
      { class: "keys" },
      swatch(colours.notObserved, "not observed"),
      swatch(colours.notFinite, "NaN or Inf"),
      ["error", "warning", "info"].filter((severity) => marked.has(severity)).map(
        (severity) => h("span", { class: "key" }, severityIcon(severity), severity),
      ),
      hasLimit ? h("span", { class: "key" }, h("span", { class: "over" }, "▲"), "beyond the limit") : null,
    ),
  ];
}

function howToRead() {
  const lines = [
    "A row is a batch-normalisation layer, the first of the network on top; a column is a training step.",
    "Blue is within the limit of the rule that judges by this number, red is beyond it, in every run alike: the worst step of a column is shown.",
    "The marks say where a finding first showed; those above the picture are about the whole model.",
    "The values at the chosen step are on the right. Click a cell to choose a layer and a step.",
    "Drag in a curve to zoom all curves, or turn the wheel with Ctrl; a double click shows all steps again.",
    "Keys: ↑ ↓ layer, ← → step (with Shift: ten), Home and End first and newest step, M the next number, F the next finding.",
  ];
  return h(
    "details",
    { class: "how" },
    h("summary", {}, "How to read this"),
    h("ul", {}, lines.map((line) => h("li", {}, line))),
  );
}
