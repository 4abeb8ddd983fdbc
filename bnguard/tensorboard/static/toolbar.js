// The top of the page: which run, compared with which, and which number is looked at.

import { copyButton, counted, h, layerName } from "./dom.js";
import { severityIcon } from "./heatmap.js";
import { valueText } from "./scale.js";

/** The bar with the runs and the link; a selection changes `choice`. */
export class Toolbar {
  #run = h("select", { id: "run" });
  #compare = h("select", { id: "compare" });
  #choice;
  #text = null;

  /** The verdict of every run, the worst first. */
  strip = h("nav", { class: "runs", "aria-label": "Runs" });

  constructor(choice, addressOf) {
    this.#choice = choice;
    this.#run.addEventListener("change", () => this.#open(this.#run.value));
    this.#compare.addEventListener("change", () =>
      choice.set({ compare: this.#compare.value === "" ? null : this.#compare.value.slice(1) }),
    );
    this.element = h(
      "header",
      { class: "toolbar" },
      h("label", { for: "run" }, "Run"),
      this.#run,
      h("label", { for: "compare" }, "Compare with"),
      this.#compare,
      copyButton(addressOf, "Copy a link to what is shown", "Copy link"),
    );
  }

  /** Offer the runs, and show the chosen ones. */
  showRuns(runs, chosen, compared) {
    // A list that is open must not be built again under the pointer.
    const text = JSON.stringify([runs.map(({ name, problem, causes }) => [name, problem, causes]), chosen, compared]);
    if (text === this.#text) return;
    this.#text = text;
    const option = (value, name, isChosen) => {
      const element = h("option", { selected: isChosen }, layerName(name, 80));
      element.value = value;
      return element;
    };
    const named = ({ name }) => (name === "." ? "(this folder)" : layerName(name, 60));
    this.#run.replaceChildren(
      ...runs.map((run) => option(run.name, `${named(run)} · ${standing(run).text}`, run.name === chosen)),
    );
    const button = ({ run, severity, text }) =>
      h(
        "button",
        { type: "button", "aria-pressed": run.name === chosen, onclick: () => this.#open(run.name) },
        severity ? severityIcon(severity) : h("span", { class: "check" }, "✓"),
        h("span", {}, `${named(run)}: `, h("strong", {}, text)),
      );
    const standings = runs.map((run) => ({ run, ...standing(run) })).sort((a, b) => a.rank - b.rank);
    this.strip.hidden = runs.length < 2;
    this.strip.replaceChildren(...standings.map(button));
    const others = runs.filter(({ name, problem }) => name !== chosen && !problem);
    // A run may have any name: the letter keeps it apart from "none".
    this.#compare.replaceChildren(
      option("", "nothing", compared === null),
      ...others.map(({ name }) => option(`=${name}`, name, name === compared)),
    );
    this.#compare.disabled = others.length === 0;
  }

  #open(run) {
    this.#choice.set({ run, metric: null, layer: null, step: null, channel: null, compare: null });
  }
}

/** Return the verdict of a listed run in words, its worst severity, and its rank: 0 is the worst. */
function standing({ problem, causes }) {
  if (problem) return { text: "cannot be shown", severity: "warning", rank: 0 };
  const found = ["error", "warning"].filter((severity) => causes[severity]);
  if (!found.length) return { text: "no problems", severity: null, rank: 3 };
  const text = found.map((severity) => counted(causes[severity], severity)).join(", ");
  return { text, severity: found[0], rank: found[0] === "error" ? 1 : 2 };
}

/** The row of numbers that the picture can show, each with how many layers are over its limit. */
export class MetricBar {
  #choice;
  element = h("div", { class: "metrics", role: "group", "aria-label": "Number shown" });

  constructor(choice) {
    this.#choice = choice;
  }

  /** Offer the metrics of a run. */
  show(metrics, chosen) {
    const focused = this.element.contains(document.activeElement) ? chosen : null;
    const button = (metric) =>
      h(
        "button",
        {
          class: "metric",
          type: "button",
          title: metric.description,
          "aria-pressed": metric.key === chosen,
          onclick: () => this.#choice.set({ metric: metric.key }),
        },
        layerName(metric.name, 40),
        badge(metric),
      );
    this.element.replaceChildren(...metrics.map(button));
    this.element.scrollLeft = this.element.querySelector("[aria-pressed=true]")?.offsetLeft ?? 0;
    if (focused) this.element.querySelector("[aria-pressed=true]")?.focus();
  }
}

function badge({ limit, over_now: now, over_ever: ever }) {
  if (limit === null || !ever) return null;
  return now
    ? h("span", { class: "badge over", title: "layers beyond the limit now" }, `▲ ${now}`)
    : h("span", { class: "badge", title: "layers that were beyond the limit" }, `${ever} earlier`);
}

/** Return a card that compares two runs: layers beyond each limit, and the worst value. */
export function comparison(first, second, metrics) {
  const cells = (metric) => [
    h("td", {}, !metric || metric.limit === null ? "–" : String(metric.over_ever)),
    h("td", { class: metric?.over_now ? "over" : "" }, !metric || metric.limit === null ? "–" : String(metric.over_now)),
    h("td", {}, metric && metric.worst_now !== null ? valueText(metric, Number(metric.worst_now)) : "–"),
  ];
  const head = (text, span = 1) => h("th", { scope: span > 1 ? "colgroup" : "col", colspan: span }, text);
  const parts = ["layers once beyond", "layers beyond now", "worst value now"].map((text) => head(text));
  const names = [first, second].map(({ name }, place) => head(`${"AB"[place]} ${layerName(name, 60)}`, 3));
  const row = (metric) => {
    const other = second.metrics.find(({ key }) => key === metric.key);
    return h("tr", {}, h("th", { scope: "row" }, layerName(metric.name, 40)), cells(metric), cells(other));
  };
  return h(
    "section",
    { class: "card comparison" },
    h("h2", {}, `${layerName(first.name, 60)} against ${layerName(second.name, 60)}`),
    h(
      "table",
      {},
      h("thead", {}, h("tr", {}, h("td"), names), h("tr", {}, h("td"), parts, parts.map((cell) => cell.cloneNode(true)))),
      h("tbody", {}, metrics.map(row)),
    ),
  );
}
