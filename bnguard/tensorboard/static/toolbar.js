// The top of the page: which run, compared with which, and which number is looked at.

import { counted, h, layerName } from "./dom.js";
import { amount, figure } from "./scale.js";

/** The bar with the runs and the link; `choice` is told what is chosen. */
export class Toolbar {
  #run = h("select", { id: "run" });
  #compare = h("select", { id: "compare" });
  #verdict = h("p", { class: "headline", "aria-live": "polite" });
  #text = null;
  #link = h("button", { class: "quiet", type: "button" }, "Copy link");

  constructor(choice, onLink) {
    const onRun = () => choice.set({ run: this.#run.value, step: null, channel: null, compare: null });
    this.#run.addEventListener("change", onRun);
    this.#compare.addEventListener("change", () =>
      choice.set({ compare: this.#compare.value === "" ? null : this.#compare.value.slice(1) }),
    );
    this.#link.addEventListener("click", () => onLink(this.#link));
    this.element = h(
      "header",
      { class: "toolbar" },
      h("label", { for: "run" }, "Run"),
      this.#run,
      h("label", { for: "compare" }, "Compare with"),
      this.#compare,
      this.#verdict,
      this.#link,
    );
  }

  /** Offer the runs, and show the chosen ones. */
  showRuns(runs, chosen, compared) {
    // A list that is open must not be built anew under the pointer.
    const text = JSON.stringify([runs.map(({ name, problem }) => [name, problem]), chosen, compared]);
    if (text === this.#text) return;
    this.#text = text;
    const option = (value, name, isChosen) => {
      const element = h("option", { selected: isChosen }, layerName(name, 80));
      element.value = value;
      return element;
    };
    this.#run.replaceChildren(...runs.map(({ name }) => option(name, name === "." ? "(this folder)" : name, name === chosen)));
    const others = runs.filter(({ name, problem }) => name !== chosen && !problem);
    // A run may have any name: the letter keeps it apart from "none".
    this.#compare.replaceChildren(
      option("", "nothing", compared === null),
      ...others.map(({ name }) => option(`=${name}`, name, name === compared)),
    );
    this.#compare.disabled = others.length === 0;
  }

  /** Say in a line how the run stands. */
  showVerdict(run) {
    const count = (severity) => run.findings.filter((finding) => finding.severity === severity).length;
    const found = ["error", "warning", "info"]
      .map((severity) => [count(severity), severity])
      .filter(([number]) => number)
      .map(([number, severity]) => (severity === "info" ? `${number} to know` : counted(number, severity)));
    const where = `${counted(run.layers.length, "layer")}, step ${figure(run.first_step)} to ${figure(run.last_step)}`;
    this.#verdict.textContent = `${found.length ? found.join(", ") : "Nothing is wrong"} · ${where}`;
  }
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
    if (focused) this.element.querySelector("[aria-pressed=true]")?.focus();
  }
}

function badge({ limit, over_now: now, over_ever: ever }) {
  if (limit === null) return null;
  if (now) return h("span", { class: "badge over" }, `▲ ${now} over`);
  return h("span", { class: "badge" }, ever ? `${ever} were over` : "✓");
}

/** Return a table of two runs: how each metric stands in the one and in the other. */
export function comparison(first, second, metrics) {
  const other = (metric) => second.metrics.find(({ key }) => key === metric.key);
  const cells = (metric) =>
    metric
      ? [
          h("td", {}, metric.limit === null ? "–" : String(metric.over_ever)),
          h("td", { class: metric.over_now ? "over" : "" }, metric.limit === null ? "–" : String(metric.over_now)),
          h("td", {}, amount(metric.worst_now, metric.unit)),
        ]
      : [h("td", {}, "–"), h("td", {}, "–"), h("td", {}, "–")];
  const heads = ["A", "B"].flatMap((run) => [`${run} ever`, `${run} now`, `${run} worst now`]);
  return h(
    "details",
    { class: "comparison", open: true },
    h("summary", {}, `A ${layerName(first.name, 60)} against B ${layerName(second.name, 60)}`),
    h(
      "table",
      {},
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Layers over the limit"), heads.map((text) => h("th", { scope: "col" }, text)))),
      h(
        "tbody",
        {},
        metrics.map((metric) =>
          h("tr", {}, h("th", { scope: "row" }, layerName(metric.name, 40)), cells(metric), cells(other(metric))),
        ),
      ),
    ),
  );
}
