// Puts the page together: what is chosen decides what is read, and what was read is shown.

import { h } from "./dom.js";
import { emptyState, problem } from "./empty.js";
import { followTheme, isVisible, onReload, readLink, writeLink } from "./host.js";
import { LayerView } from "./layer.js";
import { Overview, nearest, valuesAt } from "./overview.js";
import { closeness } from "./scale.js";
import { Choice, fromLink, toLink } from "./state.js";
import { MetricBar, Toolbar, comparison } from "./toolbar.js";
import { Verdict, causesOf } from "./verdict.js";

const RELOAD_MS = 10_000;
const EMPTY_RELOAD_MS = 1_500;
const LINK_MS = 250;

/** Draw the page into an element, and keep it up to date. */
export async function start(root, source) {
  const page = new Page(root, source);
  followTheme(() => page.repaint());
  await page.refresh();
  if (!source.isLive) return;
  onReload(() => page.refresh());
  const poll = async () => {
    if (isVisible()) await page.refresh();
    setTimeout(poll, page.isEmpty ? EMPTY_RELOAD_MS : RELOAD_MS);
  };
  setTimeout(poll, EMPTY_RELOAD_MS);
}

class Page {
  #source;
  #choice = new Choice();
  #toolbar;
  #metrics;
  #overview;
  #verdict;
  #layer;
  #comparison = h("div");
  #main;
  #message = h("div", { class: "message-area", "aria-live": "polite" }, h("p", {}, "Reading the log …"));
  #runs = [];
  #shown = null;
  #turn = 0;
  #finding = null;
  // A key held down draws once a frame, and changes the address when it is let go.
  #updating = 0;
  #linking = 0;

  constructor(root, source) {
    this.#source = source;
    this.#choice.set(fromLink(readLink()));
    this.#toolbar = new Toolbar(this.#choice, () => this.#address());
    this.#metrics = new MetricBar(this.#choice);
    this.#overview = new Overview(this.#choice);
    this.#verdict = new Verdict(async (finding) => {
      await this.#chooseFinding(finding);
      this.#overview.element.scrollIntoView({ block: "nearest" });
    });
    this.#overview.onFinding = (finding) => this.#chooseFinding(finding);
    this.#layer = new LayerView(this.#choice, (by) => this.#moveStep(by));
    this.#main = h(
      "main",
      { hidden: true },
      this.#verdict.element,
      this.#comparison,
      this.#metrics.element,
      this.#overview.element,
      this.#layer.element,
    );
    root.replaceChildren(this.#toolbar.element, this.#toolbar.strip, this.#message, this.#main);
    this.#choice.onChange((now, before) => this.#changed(now, before));
    document.addEventListener("keydown", (event) => this.#key(event));
  }

  /** Read what is new, and show it. */
  async refresh() {
    await this.#guarded(async () => {
      const runs = await this.#source.runs();
      const isKnown = JSON.stringify(runs) === JSON.stringify(this.#runs);
      if (isKnown && this.#shown && !this.#main.hidden) return;
      this.#runs = runs;
      await this.#show();
    });
  }

  /** Whether there is no run yet; TensorBoard may still be reading. */
  get isEmpty() {
    return this.#shown === null;
  }

  /** Draw again in other colours. */
  repaint() {
    this.#overview?.repaint();
    const { step, channel } = this.#choice.now;
    if (this.#shown) this.#layer.update(step ?? this.#shown.run.last_step, channel, step === null);
  }

  async #guarded(work) {
    const turn = (this.#turn += 1);
    try {
      await work(turn);
    } catch (error) {
      if (turn !== this.#turn) return;
      this.#say(problem(error.message, () => this.refresh()));
    }
  }

  #say(...content) {
    this.#main.hidden = true;
    this.#message.hidden = false;
    this.#message.replaceChildren(...content);
  }

  async #changed(now, before) {
    clearTimeout(this.#linking);
    this.#linking = setTimeout(() => writeLink(toLink(this.#choice.now)), LINK_MS);
    const reads = ["run", "compare", "metric", "layer"].some((key) => now[key] !== before[key]);
    if (reads) await this.#guarded(() => this.#show());
    else if (!this.#updating) this.#updating = requestAnimationFrame(() => this.#update());
  }

  /** Read what the choice asks for, and show it all. */
  async #show() {
    const turn = this.#turn;
    if (this.#runs.length === 0) {
      this.#toolbar.element.hidden = true;
      this.#say(emptyState());
      return;
    }
    this.#toolbar.element.hidden = false;
    const { now } = this.#choice;
    const known = (name) => this.#runs.find((run) => run.name === name);
    const listed = known(now.run) ?? this.#newest();
    const compared = known(now.compare);
    this.#toolbar.showRuns(this.#runs, listed.name, compared?.name ?? null);
    if (listed.problem) {
      this.#say(problem(listed.problem));
      return;
    }
    const wanted = compared && !compared.problem && compared !== listed ? [listed, compared] : [listed];
    const [rules, ...runs] = await Promise.all([
      this.#source.rules(),
      ...wanted.map(({ name, version }) => this.#source.run(name, version)),
    ]);
    const [run] = runs;
    const accused = new Set(run.findings.map(({ code }) => code));
    const isTelling = ({ rules: codes, over_ever: ever, has_quantiles: isMain }) =>
      isMain || ever || codes.some((code) => accused.has(code));
    const metrics = run.metrics.filter((metric) => metric.is_observed && isTelling(metric));
    const offered = metrics.length ? metrics : run.metrics;
    const asked = offered.find(({ key }) => key === now.metric);
    const opening = now.layer === null ? await this.#opening(run, asked ? [asked] : offered) : {};
    const metric = asked ?? opening.metric ?? offered[0];
    const holders = runs.filter(({ metrics: own }) => own.some(({ key }) => key === metric.key));
    const series = await Promise.all(holders.map((holder) => this.#source.stats(holder, metric.key)));
    if (turn !== this.#turn) return;
    const entries = holders.map((holder, place) => ({ run: holder, series: series[place] }));
    const isKnown = runs.some(({ layers }) => layers.includes(now.layer));
    const layer = isKnown ? now.layer : (opening.layer ?? worstLayer(run, series[0], metric));
    this.#shown = { run, runs, series: series[0], metric, offered, layer };
    this.#message.hidden = true;
    this.#main.hidden = false;
    this.#metrics.show(offered, metric.key);
    this.#comparison.replaceChildren(...(runs.length > 1 ? [comparison(run, runs[1], offered)] : []));
    this.#comparison.append(...run.problems.map((text) => problem(text)));
    this.#verdict.show(run, rules);
    this.#choice.fill({ layer, metric: metric.key, step: now.step ?? opening.step ?? null });
    this.#overview.show({ runs: entries, metric });
    await this.#showLayer(turn);
  }

  async #showLayer(turn) {
    const { runs, layer } = this.#shown;
    const owners = runs.filter(({ layers }) => layers.includes(layer));
    const curves = await Promise.all(owners.map((run) => this.#source.layer(run, layer)));
    const hasChannels = owners[0].channels.includes(layer);
    const channels = hasChannels ? await this.#source.channels(owners[0], layer) : null;
    if (turn !== this.#turn) return;
    const { step, channel } = this.#choice.now;
    const at = step ?? this.#shown.run.last_step;
    const entries = owners.map((run, place) => ({ run, series: curves[place] }));
    this.#layer.showCurves(layer, entries, at);
    this.#layer.showChannels(channels, at, channel);
    this.#update();
  }

  /** Show another step or channel of what was read. */
  #update() {
    this.#updating = 0;
    if (!this.#shown) return;
    const { step, channel, layer } = this.#choice.now;
    this.#overview.update();
    this.#verdict.choose(this.#finding, layer);
    this.#layer.update(step ?? this.#shown.run.last_step, channel, step === null);
  }

  #newest() {
    const sound = this.#runs.filter(({ problem: text }) => !text);
    return (sound.length ? sound : this.#runs).reduce((a, b) => (Number(b.version) > Number(a.version) ? b : a));
  }

  /** Return what to open on: the measure of the first cause at its worst layer and step, if any. */
  async #opening(run, metrics) {
    const [cause] = causesOf(run);
    if (!cause || cause.worst.severity === "info") {
      const calm = (key) => metrics.find((metric) => metric.limit !== null && !metric[key]);
      return { metric: calm("over_ever") ?? calm("over_now") };
    }
    let related;
    for (const [code, named] of Map.groupBy([...cause.roots, ...cause.effects], (finding) => finding.code)) {
      const judged = metrics.filter(({ rules }) => rules.includes(code));
      const spots = await Promise.all(judged.map((metric) => this.#worstSpot(run, metric, named)));
      const worst = spots.sort((a, b) => b.size - a.size)[0];
      if (worst?.size > 1) return worst;
      related ??= judged[0];
    }
    const { layer } = cause.worst;
    return { metric: related, layer: run.layers.includes(layer) ? layer : undefined };
  }

  /** Return where a metric is furthest beyond its limit, from a step on, at the layers of findings. */
  async #worstSpot(run, metric, findings, from = run.first_step) {
    const series = await this.#source.stats(run, metric.key);
    const close = metric.limit === null ? () => 0 : closeness(metric, Number(metric.largest));
    const names = new Set(findings.map(({ layer }) => layer));
    const worst = { metric, size: 0 };
    series.values.forEach((value, place) => {
      const layer = run.layers[place % run.layers.length];
      const step = series.steps[Math.floor(place / run.layers.length)];
      const size = Number.isFinite(value) ? close(value) : Number.isNaN(value) ? 0 : Infinity;
      const isNamed = names.has(layer) || names.has(null);
      if (size > worst.size && isNamed && step >= from) Object.assign(worst, { size, layer, step });
    });
    return worst;
  }

  /** Go to where a finding shows: its layer, its step, and the metric that shows it best. */
  async #chooseFinding(finding) {
    const { run, offered, metric } = this.#shown;
    this.#finding = finding.code;
    const step = finding.step === null ? null : Math.min(Math.max(finding.step, run.first_step), run.last_step);
    const judged = offered.filter(({ rules }) => rules.includes(finding.code));
    const spots = await Promise.all(
      judged.map((judging) => this.#worstSpot(run, judging, [finding], step ?? run.last_step)),
    );
    const best = spots.sort((a, b) => b.size - a.size)[0] ?? { metric };
    const layer = finding.layer ?? this.#choice.now.layer;
    this.#choice.set({ layer, step, metric: best.metric.key, channel: finding.channels[0] ?? null });
    this.#update();
  }

  #moveStep(by) {
    const { steps } = this.#shown.series;
    const { step } = this.#choice.now;
    const place = step === null ? steps.length - 1 : nearest(steps, step);
    const next = Math.min(Math.max(place + by, 0), steps.length - 1);
    this.#choice.set({ step: next === steps.length - 1 ? null : steps[next] });
  }

  #moveLayer(by) {
    const layers = [...new Set(this.#shown.runs.flatMap((run) => run.layers))];
    const place = layers.indexOf(this.#shown.layer) + by;
    const next = layers[Math.min(Math.max(place, 0), layers.length - 1)];
    this.#choice.set({ layer: next, channel: null });
  }

  #moveMetric() {
    const { offered, metric } = this.#shown;
    const next = offered[(offered.indexOf(metric) + 1) % offered.length];
    this.#choice.set({ metric: next.key });
  }

  #key(event) {
    const isTyping = event.target.closest?.("select, input, textarea");
    if (!this.#shown || isTyping || event.ctrlKey || event.metaKey || event.altKey) return;
    const many = event.shiftKey ? 10 : 1;
    const actions = {
      ArrowUp: () => this.#moveLayer(-1),
      ArrowDown: () => this.#moveLayer(1),
      ArrowLeft: () => this.#moveStep(-many),
      ArrowRight: () => this.#moveStep(many),
      Home: () => this.#choice.set({ step: this.#shown.series.steps[0] }),
      End: () => this.#choice.set({ step: null }),
      m: () => this.#moveMetric(),
      f: () => this.#nextFinding(),
    };
    const action = actions[event.key];
    // Arrows up and down scroll the page, unless the picture has the focus.
    const isVertical = event.key === "ArrowUp" || event.key === "ArrowDown";
    if (!action || (isVertical && !event.target.closest?.(".heat-grid"))) return;
    event.preventDefault();
    action();
  }

  #nextFinding() {
    const finding = this.#verdict.after(this.#finding);
    if (finding) this.#chooseFinding(finding);
  }

  /** Return the address that leads back to what is shown. */
  #address() {
    const { run, metric } = this.#shown ?? {};
    const shown = run ? { run: run.name, metric: metric.key } : {};
    return writeLink(toLink({ ...this.#choice.now, ...shown }));
  }
}

/** Return the layer that is closest to the limit, or furthest beyond it, at the newest step. */
function worstLayer(run, series, metric) {
  const close = closeness(metric, Number(metric.largest));
  const values = valuesAt(run, series, run.layers, run.last_step);
  const badness = values.map((value) => close(value) || 0);
  return run.layers[badness.indexOf(Math.max(...badness))];
}
