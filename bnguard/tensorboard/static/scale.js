// What a value means: how close it is to the limit of its rule, its colour, its text.

const WITHIN = 256;
const OVER = 256;
const NOT_OBSERVED = WITHIN + OVER;
const NOT_FINITE = NOT_OBSERVED + 1;

/** The colours of "over" end here: this many times the limit. */
export const MOST_TIMES_LIMIT = 8;

// Worse is darker on a light page, and brighter and more vivid on a dark one, never paler. Blue
// within the limit and red beyond it differ in lightness too, for colour-blind eyes.
const RAMPS = {
  light: {
    within: ["#f4f8fc", "#d3e3f3", "#9ec4e8"],
    over: ["#e5533b", "#b3141f", "#4d0009"],
    notObserved: ["#ffffff", "#e9ebee"],
    notFinite: ["#1a1a1a", "#d428c0"],
  },
  dark: {
    within: ["#1a222d", "#1f3148", "#26466b"],
    over: ["#b23c2d", "#dd3b21", "#ff5f12"],
    notObserved: ["#15171b", "#24272d"],
    notFinite: ["#f2f2f2", "#d428c0"],
  },
};

/** Return how close values come to the limit: 1 is the limit, 2 twice as bad; NaN if unobserved. */
export function closeness(metric, largest) {
  const { limit, limit_side: side } = metric;
  if (limit === null || limit === undefined) {
    const top = largest > 0 ? largest : 1;
    return (value) => Math.min(Math.abs(value) / top, 0.999);
  }
  if (side === "below") return (value) => (value <= 0 ? Infinity : limit / value);
  if (limit === 0) return (value) => (value > 0 ? 1 + ((MOST_TIMES_LIMIT - 1) * value) / largest : 0);
  return side === "either" ? (value) => Math.abs(value) / limit : (value) => Math.max(value / limit, 0);
}

/** Return whether a value is on the wrong side of its rule's limit. */
export function isOver(metric, value) {
  if (metric.limit === null || metric.limit === undefined || Number.isNaN(value)) return false;
  if (metric.limit_side === "below") return value < metric.limit;
  return (metric.limit_side === "either" ? Math.abs(value) : value) > metric.limit;
}

/** Return the place in a palette of a value whose closeness to the limit is given. */
export function colourIndex(value, close) {
  if (Number.isNaN(value)) return NOT_OBSERVED;
  if (!Number.isFinite(value)) return NOT_FINITE;
  // A value on the limit is within it, as for the rules.
  if (close <= 1) return Math.floor(close * (WITHIN - 1));
  const depth = Math.min(Math.log2(close) / Math.log2(MOST_TIMES_LIMIT), 1);
  return WITHIN + Math.floor(depth * (OVER - 1));
}

/** Return the colours of a theme as two tables of pixels: they differ where a cell is striped. */
export function palette(theme) {
  const ramp = RAMPS[theme];
  const first = new Uint32Array(NOT_FINITE + 1);
  for (let i = 0; i < WITHIN; i += 1) first[i] = pixel(along(ramp.within, i / (WITHIN - 1)));
  for (let i = 0; i < OVER; i += 1) first[WITHIN + i] = pixel(along(ramp.over, i / (OVER - 1)));
  const second = first.slice();
  [first[NOT_OBSERVED], second[NOT_OBSERVED]] = ramp.notObserved.map((hex) => pixel(rgb(hex)));
  [first[NOT_FINITE], second[NOT_FINITE]] = ramp.notFinite.map((hex) => pixel(rgb(hex)));
  return { first, second };
}

/** Return CSS gradients and swatches of a theme, for the legend. */
export function legendColours(theme) {
  const ramp = RAMPS[theme];
  const striped = ([a, b]) => `repeating-linear-gradient(135deg, ${a} 0 2px, ${b} 2px 4px)`;
  return {
    within: `linear-gradient(90deg, ${ramp.within.join(", ")})`,
    over: `linear-gradient(90deg, ${ramp.over.join(", ")})`,
    notObserved: striped(ramp.notObserved),
    notFinite: striped(ramp.notFinite),
  };
}

function along(colours, share) {
  const place = share * (colours.length - 1);
  const low = Math.min(Math.floor(place), colours.length - 2);
  const [from, to] = [rgb(colours[low]), rgb(colours[low + 1])];
  return from.map((channel, i) => Math.round(channel + (to[i] - channel) * (place - low)));
}

function rgb(hex) {
  return [1, 3, 5].map((start) => parseInt(hex.slice(start, start + 2), 16));
}

function pixel([red, green, blue]) {
  return ((255 << 24) | (blue << 16) | (green << 8) | red) >>> 0;
}

/** Return a number as text, in three figures; JSON's words for what is not finite pass through. */
export function figure(value) {
  if (value === null || value === undefined) return "–";
  const number = Number(value);
  if (Number.isNaN(number)) return value === "NaN" ? "NaN" : "–";
  if (!Number.isFinite(number)) return number > 0 ? "∞" : "−∞";
  const size = Math.abs(number);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return number.toExponential(1).replace("-", "−");
  if (Number.isInteger(number) || size >= 1000) {
    return Math.round(number).toLocaleString("en").replace("-", "−");
  }
  return String(Number(number.toPrecision(3))).replace("-", "−");
}

/** Return a value with its unit. */
export function amount(value, unit) {
  const text = figure(value);
  if (!unit || text === "–") return text;
  return unit === "%" ? `${text}%` : `${text} ${unit}`;
}

/** Return whether a metric is logged as the logarithm of a factor. */
export function isFactor({ key }) {
  return key.endsWith("log_variance_ratio");
}

/** Return a logarithm as a factor: "4.5×". */
export function factor(logarithm) {
  return `${figure(Number(Math.exp(Math.abs(logarithm)).toPrecision(2)))}×`;
}

/** Return a value of a metric in words: "2 σ", "28× too small" of a running variance. */
export function valueText(metric, value) {
  if (!isFactor(metric) || !Number.isFinite(value)) return amount(value, metric.unit);
  const text = factor(value);
  return text === "1×" ? text : `${text} too ${value > 0 ? "small" : "large"}`;
}

/** Return a limit in words: "limit 1 σ", "at least 3". */
export function limitText(metric) {
  if (isFactor(metric)) return `limit ${factor(metric.limit)}`;
  const text = amount(metric.limit, metric.unit);
  if (metric.limit_side === "below") return `at least ${text}`;
  return metric.limit_side === "either" ? `limit ±${text}` : `limit ${text}`;
}
