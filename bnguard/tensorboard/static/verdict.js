// The verdict: a card for each root cause, with its number, what it leads to and what to do next.

import { copyButton, counted, h, layerLabel, shown } from "./dom.js";
import { severityIcon } from "./heatmap.js";
import { factorTicks, ticks } from "./plot.js";
import { amount, factor, figure } from "./scale.js";

const LAYERS_SHOWN = 3;
const CAUSES_SHOWN = 50;

/** The cards of a run; a click calls `onChoose(finding)`. */
export class Verdict {
  #onChoose;
  #rules = {};
  #causes = [];
  #text = null;
  #title = h("h2", { class: "headline", id: "verdict-title", "aria-live": "polite" });
  #body = h("div", { class: "finding-list" });
  element = h("section", { class: "verdicts", "aria-labelledby": "verdict-title" }, this.#title, this.#body);

  constructor(onChoose) {
    this.#onChoose = onChoose;
  }

  /** Show what is wrong in a run; `rules` are the pages of the rules by code. */
  show(run, rules) {
    const looked = `${counted(run.layers.length, "layer")}, step ${figure(run.first_step)} to ${figure(run.last_step)}`;
    // What is shown already stays as it is: a page may be open in it.
    const text = JSON.stringify([run.name, looked, run.findings]);
    if (text === this.#text) return;
    this.#text = text;
    this.#rules = rules;
    this.#causes = causesOf(run);
    const serious = this.#causes.filter(({ worst }) => worst.severity !== "info");
    const notes = this.#causes.slice(serious.length);
    this.#title.replaceChildren(headline(serious), h("span", { class: "muted" }, ` · ${looked}`));
    this.#body.replaceChildren(...serious.slice(0, CAUSES_SHOWN).map((cause) => this.#card(cause)));
    const rest = serious.length - CAUSES_SHOWN;
    if (rest > 0) this.#body.append(h("p", { class: "muted" }, `and ${counted(rest, "more cause")}`));
    if (!serious.length) this.#body.append(nothingWrong(run));
    if (notes.length) {
      const cards = h("div", { class: "finding-list" }, notes.slice(0, CAUSES_SHOWN).map((cause) => this.#card(cause)));
      this.#body.append(h("details", { class: "notes" }, h("summary", {}, `${notes.length} to know`), cards));
    }
  }

  /** Mark the card of a finding as the one that is chosen. */
  choose(code, layer) {
    for (const card of this.#body.querySelectorAll(".finding")) {
      card.classList.toggle("chosen", card.dataset.code === code);
      for (const chip of card.querySelectorAll(".chip")) {
        chip.setAttribute("aria-pressed", card.dataset.code === code && chip.dataset.layer === layer);
      }
    }
  }

  /** Return the finding after the one of a code, in the order of the cards. */
  after(code) {
    const place = this.#causes.findIndex(({ worst }) => worst.code === code);
    return this.#causes.length ? this.#causes[(place + 1) % this.#causes.length].worst : null;
  }

  #card({ worst, roots, effects }) {
    const title = h(
      "button",
      { class: "finding-title", type: "button", onclick: () => this.#onChoose(worst) },
      severityIcon(worst.severity),
      h("strong", {}, sentence(shown(worst.message || worst.name, 600))),
    );
    const since = Math.min(...roots.map(({ step }) => step ?? Infinity));
    const about = [
      h("span", { class: `severity ${worst.severity}` }, worst.severity),
      ` ${shown(worst.code, 20)} ${shown(worst.name, 60)}`,
      Number.isFinite(since) ? ` · since step ${since.toLocaleString("en")}` : "",
    ];
    return h(
      "article",
      { class: `card finding ${worst.severity}`, "data-code": worst.code },
      h("div", {}, title, h("p", { class: "muted" }, about), evidence(worst.evidence), this.#places(roots)),
      h("div", {}, nextStep(worst), this.#effects(effects), this.#page(worst.code)),
    );
  }

  #places(findings) {
    const chip = (finding) =>
      h(
        "button",
        {
          class: "chip",
          type: "button",
          "data-layer": finding.layer ?? "",
          "aria-pressed": "false",
          title: finding.step === null ? null : `since step ${finding.step.toLocaleString("en")}`,
          onclick: () => this.#onChoose(finding),
        },
        layerLabel(finding.layer),
      );
    const box = h("div", { class: "places" }, findings.slice(0, LAYERS_SHOWN).map(chip));
    const rest = findings.slice(LAYERS_SHOWN);
    if (rest.length) {
      const more = h("button", { class: "quiet", type: "button" }, `${rest.length} more`);
      more.addEventListener("click", () => more.replaceWith(...rest.map(chip)));
      box.append(more);
    }
    return box;
  }

  #effects(effects) {
    if (!effects.length) return null;
    const codes = Map.groupBy(effects, ({ code }) => code);
    const item = ([code, [first, ...rest]]) => {
      const where = first.layer === null ? "the whole model" : counted(rest.length + 1, "layer");
      const text = `${shown(code, 20)} ${shown(first.name, 60)}, ${where}: ${shown(first.evidence.text, 160)}`;
      return h("li", {}, h("button", { class: "link", type: "button", onclick: () => this.#onChoose(first) }, text));
    };
    const names = [...codes.values()].map(([{ name }]) => shown(name, 60));
    return h("details", { class: "effects" }, h("summary", {}, `Leads to ${names.join(", ")}`), h("ul", {}, [...codes].map(item)));
  }

  #page(code) {
    if (!Object.hasOwn(this.#rules, code)) return null;
    const details = h("details", { class: "rule" }, h("summary", {}, `What is ${shown(code, 20)}?`));
    details.addEventListener("toggle", () => {
      if (details.open && details.children.length === 1) details.append(rulePage(this.#rules[code]));
    });
    return details;
  }
}

/** Return the root causes of a run as `{worst, roots, effects}`, errors before warnings. */
export function causesOf({ findings, causes }) {
  return causes.map(({ roots, effects }) => ({
    worst: findings[roots[0]],
    roots: roots.map((place) => findings[place]),
    effects: effects.map((place) => findings[place]),
  }));
}

function headline(causes) {
  if (!causes.length) return "✓ No problems found";
  const findings = causes.flatMap(({ roots, effects }) => [...roots, ...effects]);
  const layers = new Set(findings.map(({ layer }) => layer).filter((name) => name !== null)).size;
  return `${counted(causes.length, "cause")}, ${layers ? counted(layers, "layer") : "the whole model"}`;
}

function sentence(text) {
  return text.charAt(0).toUpperCase() + text.slice(1);
}

/** Return a number of the evidence's scale with its unit; a logarithm as a factor. */
function measured(value, about) {
  return isFactor(about) && Number.isFinite(Number(value)) ? factor(value) : amount(value, shown(about.unit, 12));
}

function isFactor({ unit }) {
  return unit === "ln";
}

/** Return the number against its limit, in words and as a bar with a labelled scale from 0. */
function evidence(about) {
  if (about.value === null) return null;
  const [value, limit] = [Math.abs(Number(about.value)), Math.abs(Number(about.limit))];
  const text = h("div", {}, h("strong", { class: "number" }, shown(about.text, 160)));
  if (about.limit === null || !Number.isFinite(value + limit)) return h("div", { class: "evidence" }, text);
  const top = Math.max(value, limit, 1e-9);
  const marks = isFactor(about) ? factorTicks(0, 2 * top + 3, 99) : ticks(0, 2 * top, 2);
  const end = marks.find((mark) => mark >= top * 1.02) ?? top;
  const bar = (name, share) => {
    const part = h("span", { class: name });
    part.style[name === "fill" ? "width" : "left"] = `${100 * share}%`;
    return part;
  };
  const at = bar("tick", limit / end);
  at.append(h("span", { class: limit > end / 2 ? "before" : "" }, `${about.is_minimum ? "at least" : "limit"} ${measured(limit, about)}`));
  return h(
    "div",
    { class: "evidence" },
    text,
    h("div", { class: "gauge", "aria-hidden": "true" }, bar("fill", value / end), at, h("span", { class: "end" }, measured(end, about))),
  );
}

function nextStep({ code, fix }) {
  const command = shown(fix.command || (code ? `bnguard explain ${code}` : ""), 1000);
  return h(
    "div",
    { class: "next" },
    fix.summary ? h("p", {}, h("strong", {}, "Next: "), shown(fix.summary, 600)) : null,
    command
      ? h("div", { class: "command" }, h("code", {}, command), copyButton(() => command, `Copy: ${command}`))
      : null,
  );
}

/** Return the page of a rule: its headline, and sections of paragraphs with code after them. */
function rulePage([headline, sections]) {
  const paragraph = ([text, code]) => [h("p", {}, text.replaceAll("`", "")), code ? h("pre", {}, code) : null];
  const section = ([title, paragraphs]) => [h("h4", {}, title), paragraphs.map(paragraph)];
  return h("div", { class: "rule-page" }, [h("p", {}, headline), sections.map(section)].flat(4));
}

function nothingWrong({ metrics, steps }) {
  const names = (isObserved) =>
    metrics
      .filter((metric) => metric.limit !== null && metric.has_quantiles && metric.is_observed === isObserved)
      .map(({ name }) => shown(name, 40).toLowerCase())
      .join(", ");
  const unseen = names(false);
  return h(
    "div",
    { class: "card fine" },
    h("p", {}, `Looked at, in ${counted(steps, "logged step")}: ${names(true) || "nothing with a limit"}.`),
    unseen ? h("p", {}, `Not observed: ${unseen}.`) : null,
  );
}
