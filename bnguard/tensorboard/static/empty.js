// Shown in place of the picture if there is no data.

import { h, shown } from "./dom.js";

const LIGHTNING = `from bnguard.lightning import BatchNormMonitor

trainer = Trainer(callbacks=[BatchNormMonitor()], ...)`;

/** Return how to get data into an empty tab. */
export function emptyState() {
  return h(
    "section",
    { class: "card empty" },
    h("h2", {}, "No run here was watched by bnguard yet"),
    h(
      "p",
      {},
      "This tab shows the batch-normalisation layers of a network while it trains: whether training and " +
        "evaluation agree, which layers drift, which channels are dead, and what to do about it.",
    ),
    h("p", {}, "With Lightning, add one callback; it writes into the log that TensorBoard reads already:"),
    h("pre", {}, LIGHTNING),
    h("p", {}, "The tab fills itself as soon as the first step is logged. ", h("code", {}, "bnguard demo"), " makes a run to look at."),
  );
}

/** Return why something cannot be shown, and a button to try again where that may help. */
export function problem(text, onRetry = null) {
  return h(
    "div",
    { class: "problem", role: "alert" },
    h("strong", {}, "This cannot be shown: "),
    shown(text, 500),
    onRetry ? h("button", { type: "button", onclick: onRetry }, "Try again") : null,
  );
}
