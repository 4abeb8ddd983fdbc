// The findings: what is wrong, where, since when, on what evidence, and what to do next.

import { copyButton, counted, h, layerName, shown } from "./dom.js";
import { severityIcon } from "./heatmap.js";
import { amount } from "./scale.js";

const RANK = { error: 0, warning: 1, info: 2 };
const LAYERS_SHOWN = 4;
const GROUPS_SHOWN = 50;

/** The list of findings; `onChoose(finding, layer)` is told what is clicked. */
export class Findings {
  #onChoose;
  #rules = {};
  #groups = [];
  #text = null;
  #body = h("div", { class: "finding-list" });
  #title = h("h2", { id: "findings-title" }, "Findings");
  element = h(
    "section",
    { class: "card findings", "aria-labelledby": "findings-title" },
    this.#title,
    this.#body,
  );

  constructor(onChoose) {
    this.#onChoose = onChoose;
  }

  /** Show the findings of a run; `rules` are the pages of the rules by code. */
  show(findings, rules) {
    // What is shown already stays as it is: a page may stand open in it.
    const text = JSON.stringify(findings);
    if (text === this.#text) return;
    this.#text = text;
    this.#rules = rules;
    this.#groups = groupedFindings(findings);
    const cards = this.#groups.slice(0, GROUPS_SHOWN).map((group) => this.#card(group));
    const rest = this.#groups.length - cards.length;
    this.#title.textContent = findings.length ? counted(findings.length, "finding") : "Findings";
    this.#body.replaceChildren(...(cards.length ? cards : [nothingWrong()]));
    if (rest > 0) this.#body.append(h("p", { class: "muted" }, `and ${counted(rest, "more group")}`));
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

  /** Return the finding after the one of a code, in the order of the list. */
  after(code) {
    const place = this.#groups.findIndex(([worst]) => worst.code === code);
    return this.#groups.length ? this.#groups[(place + 1) % this.#groups.length][0] : null;
  }

  #card(group) {
    const [worst] = group;
    const title = h(
      "button",
      { class: "finding-title", type: "button", onclick: () => this.#onChoose(worst, worst.layer) },
      severityIcon(worst.severity),
      h("span", { class: "code" }, shown(worst.code, 20)),
      h("span", { class: "name" }, shown(worst.name, 60)),
      h("span", { class: `severity ${worst.severity}` }, worst.severity),
    );
    return h(
      "article",
      { class: `finding ${worst.severity}`, "data-code": worst.code },
      title,
      h("p", { class: "message" }, shown(worst.message, 600)),
      evidence(worst.evidence),
      this.#places(group),
      nextStep(worst),
      this.#page(worst.code),
    );
  }

  #places(group) {
    const places = group.flatMap((finding) => {
      const names = finding.layers.length ? finding.layers : [finding.layer];
      return names.map((name) => ({ finding, name }));
    });
    const chip = ({ finding, name }) =>
      h(
        "button",
        {
          class: "chip",
          type: "button",
          "data-layer": name ?? "",
          "aria-pressed": "false",
          onclick: () => this.#onChoose(finding, name),
        },
        name === null ? "the whole model" : layerName(name, 40),
        finding.step === null
          ? null
          : h("span", { class: "muted" }, ` since step ${finding.step.toLocaleString("en")}`),
      );
    const box = h("div", { class: "places" }, places.slice(0, LAYERS_SHOWN).map(chip));
    const rest = places.slice(LAYERS_SHOWN);
    if (rest.length) {
      const more = h("button", { class: "quiet", type: "button" }, `${rest.length} more`);
      more.addEventListener("click", () => more.replaceWith(...rest.map(chip)));
      box.append(more);
    }
    return box;
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

/** Return findings of one code and severity together, the worst groups and findings first. */
export function groupedFindings(findings) {
  const groups = new Map();
  for (const finding of findings) {
    const key = `${RANK[finding.severity]} ${finding.code} ${finding.name}`;
    groups.set(key, [...(groups.get(key) ?? []), finding]);
  }
  const order = (a, b) => excess(b) - excess(a) || (a.step ?? Infinity) - (b.step ?? Infinity) || 0;
  return [...groups.entries()]
    .sort(([a], [b]) => (a < b ? -1 : a > b ? 1 : 0))
    .map(([, group]) => group.sort(order));
}

/** Return how far the value is towards the limit (below 1), or beyond it (above 1). */
function excess({ evidence: { value, limit, is_minimum } }) {
  const [size, bound] = [Math.abs(value), Math.abs(limit)];
  const [near, far] = is_minimum && bound !== 0 ? [size, bound] : [bound, size];
  // Infinity minus itself would be no order.
  if (!Number.isFinite(size) || !(near > 0)) return far === 0 ? 0 : Number.MAX_VALUE;
  return far / near;
}

function evidence({ measure, value, limit, unit, is_minimum }) {
  if (value === null) return null;
  const numbers = [Number(value), Number(limit)];
  const top = Math.max(...numbers.map(Math.abs));
  const share = (number) => (Number.isFinite(number) && top > 0 ? Math.abs(number) / top : 1);
  const fill = h("span", { class: "fill" });
  const tick = h("span", { class: "tick" });
  fill.style.width = `${100 * share(numbers[0])}%`;
  tick.style.left = `${100 * share(numbers[1])}%`;
  const side = is_minimum ? "at least" : "limit";
  return h(
    "div",
    { class: "evidence" },
    h(
      "div",
      {},
      `${shown(measure, 80)} `,
      h("strong", {}, amount(value, shown(unit, 12))),
      h("span", { class: "muted" }, limit === null ? "" : ` (${side} ${amount(limit, shown(unit, 12))})`),
    ),
    limit === null ? null : h("div", { class: "gauge", "aria-hidden": "true" }, fill, tick),
  );
}

function nextStep({ code, fix }) {
  const command = shown(fix.command || (code ? `bnguard explain ${code}` : ""), 1000);
  return h(
    "div",
    { class: "next" },
    fix.summary ? h("p", {}, h("strong", {}, "Next: "), shown(fix.summary, 600)) : null,
    command
      ? h("div", { class: "command" }, h("code", {}, command), copyButton(command, `Copy: ${command}`))
      : null,
  );
}

/** Return the page of a rule: its headings, paragraphs and code blocks. */
function rulePage(text) {
  const [, ...blocks] = text.split(/\n{2,}/);
  return h("div", { class: "rule-page" }, blocks.flatMap(block));
}

function block(text) {
  const lines = text.split("\n");
  const depth = Math.min(...lines.filter(Boolean).map((line) => line.search(/\S/)));
  const heading = /^[A-Z][\w ]*:$/.exec(lines[0]);
  if (heading) {
    const rest = lines.slice(1).join("\n");
    return [h("h4", {}, heading[0].slice(0, -1)), ...(rest.trim() ? block(rest) : [])];
  }
  if (depth >= 8) return [h("pre", {}, lines.map((line) => line.slice(8)).join("\n"))];
  return paragraphs(lines, depth).map((part) => h("p", {}, part));
}

/** Return lines as paragraphs; of a list of fields, as under "Limits", each is one. */
function paragraphs(lines, depth) {
  const isField = (line) => line.search(/\S/) === depth && /^\s*[a-z_]+: /.test(line);
  const parts = [];
  for (const line of lines) {
    if (parts.length && !isField(line)) parts[parts.length - 1] += ` ${line.trim()}`;
    else parts.push(line.trim());
  }
  return parts.map((part) => part.replace(/::$/, ":").replaceAll("``", ""));
}

function nothingWrong() {
  return h(
    "div",
    { class: "fine" },
    h("strong", {}, "Nothing is wrong."),
    h("p", {}, "No rule found a fault in what was logged so far."),
  );
}
