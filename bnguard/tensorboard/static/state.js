// What is chosen: run, metric, layer, step, channel; and the link that leads back to it.

/** Everything null is left to the page: the newest step, the worst layer. */
const NOTHING = { run: null, compare: null, metric: null, layer: null, step: null, channel: null };
const NUMBERS = new Set(["step", "channel"]);

/** Holds the choice, and calls its listeners when it changes. */
export class Choice {
  #state = { ...NOTHING };
  #listeners = [];

  get now() {
    return this.#state;
  }

  set(patch) {
    const next = { ...this.#state, ...patch };
    if (Object.keys(next).every((key) => next[key] === this.#state[key])) return;
    const before = this.#state;
    this.#state = next;
    for (const listener of this.#listeners) listener(next, before);
  }

  /** Fill in what was left to the page; no listener is called. */
  fill(patch) {
    this.#state = { ...this.#state, ...patch };
  }

  onChange(listener) {
    this.#listeners.push(listener);
  }
}

/** Return a choice as query parameters, without what is left to the page. */
export function toLink(state) {
  const entries = Object.entries(state).filter(([, value]) => value !== null);
  return Object.fromEntries(entries.map(([key, value]) => [key, String(value)]));
}

/** Return the choice that a link makes; what it does not know is left out. */
export function fromLink(parameters) {
  const state = {};
  for (const key of Object.keys(NOTHING)) {
    const value = parameters[key];
    if (value === undefined) continue;
    if (!NUMBERS.has(key)) state[key] = value;
    else if (value !== "" && Number.isFinite(Number(value))) state[key] = Number(value);
  }
  return state;
}
