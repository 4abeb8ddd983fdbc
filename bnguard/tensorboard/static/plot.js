// A small chart: axes, lines, points, filled curves, a limit, a cursor; its numbers are also text.

import { h } from "./dom.js";
import { theme } from "./host.js";
import { factor, figure } from "./scale.js";

const LEFT = 46;
const RIGHT = 10;
const TOP = 8;
const BOTTOM = 20;

/**
 * One chart on a canvas. `draw(spec)` draws it again:
 *
 *   x, y       {min, max, label}: what the axes span; y of logarithms of factors has `isFactor`
 *   series     [{style, colour, dash, xs, ys, size}]: style is "line", "dots", "stems" or "area"
 *   limits     [{value, label, side, isMirrored}]: lines, with what lies beyond them shaded; of the
 *              two sides of a limit the mirrored one has its label only if all is beyond it
 *   bands      [{at, colour}]: single places on x that are marked
 *   cursor     place on x that is chosen
 *
 * `onPick(x)`, `onHover(x or null)`, `onZoom({min, max} or null)` and `onMove(±1)` report clicks,
 * the pointer, zooming and arrow keys, in the units of x. Dragging zooms, as does the wheel with
 * Ctrl, Alt or ⌘; a double click shows all again.
 */
export class Plot {
  #canvas = h("canvas", { role: "img" });
  #spec = null;
  #hover = null;
  #from = null;
  #isSeen = true;
  #isStale = false;

  constructor({ height = 120, onPick = null, onHover = null, onZoom = null, onMove = null } = {}) {
    this.element = h("div", { class: "plot" }, this.#canvas);
    this.#canvas.style.height = `${height}px`;
    const on = (type, listener) => this.#canvas.addEventListener(type, listener);
    const at = (event) => this.#xAt(event.offsetX);
    on("pointermove", (event) => {
      this.#hover = at(event);
      this.#paint();
      onHover?.(this.#hover);
    });
    on("pointerleave", () => {
      this.#hover = null;
      this.#paint();
      onHover?.(null);
    });
    if (onMove) {
      this.#canvas.tabIndex = 0;
      on("keydown", (event) => {
        const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
        if (!by) return;
        event.preventDefault();
        event.stopPropagation();
        onMove(by);
      });
    }
    if (onPick) this.#canvas.classList.add("pickable");
    on("pointerdown", (event) => {
      this.#from = at(event);
      if (onZoom) this.#canvas.setPointerCapture(event.pointerId);
    });
    on("pointerup", (event) => {
      const [from, to] = [this.#from, at(event)];
      this.#from = null;
      if (from === null || to === null) return;
      const { min, max } = this.#spec.x;
      const isDrag = onZoom && Math.abs(to - from) > 0.02 * (max - min);
      if (isDrag) onZoom({ min: Math.min(from, to), max: Math.max(from, to) });
      else onPick?.(to);
    });
    on("dblclick", () => onZoom?.(null));
    on("wheel", (event) => {
      const x = at(event);
      if (!onZoom || x === null || !(event.ctrlKey || event.altKey || event.metaKey)) return;
      event.preventDefault();
      const { min, max } = this.#spec.x;
      const scale = event.deltaY < 0 ? 0.8 : 1.25;
      onZoom({ min: x - (x - min) * scale, max: x + (max - x) * scale });
    });
    new ResizeObserver(() => this.#paint()).observe(this.#canvas);
    // What is scrolled out of sight is drawn when it comes back.
    new IntersectionObserver(([entry]) => {
      this.#isSeen = entry.isIntersecting;
      if (this.#isSeen && this.#isStale) this.#paint();
    }).observe(this.#canvas);
  }

  /** Draw what is given; `description` says in words what is to be seen. */
  draw(spec, description) {
    this.#spec = spec;
    this.#canvas.setAttribute("aria-label", description);
    this.#paint();
  }

  #xAt(offset) {
    if (!this.#spec) return null;
    const { min, max } = this.#spec.x;
    const width = this.#canvas.clientWidth - LEFT - RIGHT;
    const share = (offset - LEFT) / width;
    return share < -0.02 || share > 1.02 ? null : min + Math.min(Math.max(share, 0), 1) * (max - min);
  }

  #paint() {
    const canvas = this.#canvas;
    const { clientWidth: width, clientHeight: height } = canvas;
    this.#isStale = !this.#isSeen;
    if (!this.#spec || width === 0 || this.#isStale) return;
    const context = sharpContext(canvas);
    new Painter(context, this.#spec, width, height).paint(this.#hover, this.#from);
  }
}

/** Return a cleared 2D context in CSS pixels, sharp on any screen. */
export function sharpContext(canvas) {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(canvas.clientWidth * ratio);
  canvas.height = Math.round(canvas.clientHeight * ratio);
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  return context;
}

// Asking for a computed style costs a layout, and a chart asks a hundred times.
const colours = new Map();

/** Return a colour of the style sheet by its name. */
export function colour(name) {
  const key = `${theme()} ${name}`;
  if (!colours.has(key)) {
    const value = getComputedStyle(document.documentElement).getPropertyValue(`--${name}`);
    colours.set(key, value.trim());
  }
  return colours.get(key);
}

/** Return round numbers that divide a span, at most `most` of them. */
export function ticks(min, max, most) {
  const span = max - min;
  if (!(span > 0) || !Number.isFinite(span)) return [min];
  const rough = span / Math.max(most, 1);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((size) => size >= rough);
  const first = Math.ceil(min / step - 1e-9);
  const last = Math.floor(max / step + 1e-9);
  return Array.from({ length: last - first + 1 }, (_, i) => (first + i) * step);
}

/** Return the ticks of an axis of logarithms: factors 1, 2, 5, 10 … to both sides. */
export function factorTicks(min, max, most) {
  const size = Math.max(-min, max);
  const factors = [];
  for (let power = 1; Math.log(power) <= size; power *= 10) factors.push(power, 2 * power, 5 * power);
  const places = factors.map(Math.log).flatMap((place) => (place ? [-place, place] : [0]));
  const seen = places.filter((place) => place >= min && place <= max).sort((a, b) => a - b);
  // Where they would touch, powers of ten are enough.
  const isTen = (place) => Number.isInteger(Number(Math.log10(Math.exp(Math.abs(place))).toFixed(6)));
  return seen.length > most && seen.some((place) => place && isTen(place)) ? seen.filter(isTen) : seen;
}

/** Return a span that holds the finite numbers given, with a little air; `[0, 1]` without any. */
export function spanOf(...arrays) {
  let [min, max] = [Infinity, -Infinity];
  for (const array of arrays) {
    for (const value of array) {
      if (!Number.isFinite(value)) continue;
      if (value < min) min = value;
      if (value > max) max = value;
    }
  }
  if (min > max) return { min: 0, max: 1 };
  if (min === 0 && max === 0) return { min: 0, max: 1 };
  if (min === max) return { min: Math.min(0, min * 1.5), max: Math.max(0, max * 1.5) };
  const air = (max - min) * 0.06;
  return { min: min >= 0 && min < air * 4 ? 0 : min - air, max: max + air };
}

/** Draws one spec on a context. */
class Painter {
  constructor(context, spec, width, height) {
    Object.assign(this, { context, spec, width, height });
    this.right = width - RIGHT;
    this.bottom = height - BOTTOM;
  }

  x(value) {
    const { min, max } = this.spec.x;
    return LEFT + ((value - min) / (max - min || 1)) * (this.right - LEFT);
  }

  y(value) {
    const { min, max } = this.spec.y;
    return this.bottom - ((value - min) / (max - min || 1)) * (this.bottom - TOP);
  }

  paint(hover, from) {
    const { context, spec } = this;
    context.font = "11px system-ui, Roboto, sans-serif";
    context.lineJoin = "round";
    this.axes();
    context.save();
    context.beginPath();
    context.rect(LEFT, TOP - 4, this.right - LEFT, this.bottom - TOP + 8);
    context.clip();
    for (const band of spec.bands ?? []) this.band(band);
    for (const limit of spec.limits ?? []) this.beyond(limit);
    for (const series of spec.series) this[series.style](series);
    for (const limit of spec.limits ?? []) this.limit(limit);
    if (spec.cursor !== null && spec.cursor !== undefined) this.rule(spec.cursor, "ink", []);
    if (hover !== null && from !== null) {
      const [a, b] = [this.x(from), this.x(hover)];
      context.fillStyle = colour("dead");
      context.fillRect(Math.min(a, b), TOP - 4, Math.abs(b - a), this.bottom - TOP + 8);
    }
    if (hover !== null) this.crossHair(hover);
    context.restore();
  }

  /** Rule the place of the pointer, and write the place and the values there. */
  crossHair(at) {
    const { context, spec } = this;
    this.rule(at, "muted", [2, 3]);
    const isRight = this.x(at) > (LEFT + this.right) / 2;
    context.textAlign = isRight ? "right" : "left";
    context.textBaseline = "middle";
    const write = (text, x, y, name) => {
      context.strokeStyle = colour("card");
      context.lineWidth = 3;
      context.strokeText(text, x + (isRight ? -6 : 6), y);
      context.fillStyle = colour(name);
      context.fillText(text, x + (isRight ? -6 : 6), y);
    };
    for (const { xs, ys, colour: name } of spec.series) {
      if (!xs.length) continue;
      let place = 0;
      while (place < xs.length - 1 && Math.abs(xs[place + 1] - at) <= Math.abs(xs[place] - at)) place += 1;
      const value = ys[place];
      if (!Number.isFinite(value)) continue;
      const [x, y] = [this.x(xs[place]), this.y(value)];
      this.dots({ xs: [xs[place]], ys: [value], colour: name, size: 3 });
      const text = spec.y.isFactor ? factor(value) : figure(value);
      write(text, x, Math.min(Math.max(y, TOP + 4), this.bottom - 16), name);
    }
    write(`${spec.x.label ?? ""} ${figure(spec.x.whole ? Math.round(at) : at)}`, this.x(at), this.bottom - 4, "text");
  }

  axes() {
    const { context, spec } = this;
    context.textBaseline = "middle";
    context.textAlign = "right";
    const { min, max, isFactor } = spec.y;
    for (const value of (isFactor ? factorTicks : ticks)(min, max, Math.max(2, (this.bottom - TOP) / (isFactor ? 14 : 34)))) {
      const y = Math.round(this.y(value)) + 0.5;
      context.strokeStyle = colour(value === 0 ? "line-strong" : "line");
      this.path([[LEFT, y], [this.right, y]]);
      context.fillStyle = colour("muted");
      context.fillText(isFactor ? factor(value) : figure(Number(value.toPrecision(10))), LEFT - 6, y);
    }
    if (isFactor) {
      context.textAlign = "right";
      if (max > 0) context.fillText("too small ↑", this.right, TOP + 4);
      if (min < 0) context.fillText("too large ↓", this.right, this.bottom - 6);
    }
    context.textBaseline = "top";
    context.textAlign = "center";
    const label = spec.x.label ?? "";
    const room = this.right - LEFT - context.measureText(label).width - 16;
    const end = LEFT + room;
    for (const value of ticks(spec.x.min, spec.x.max, Math.max(2, room / 56))) {
      const x = this.x(value);
      if (spec.x.whole && !Number.isInteger(value)) continue;
      if (label && x > end) continue;
      context.fillText(figure(Number(value.toPrecision(10))), x, this.bottom + 6);
    }
    context.textAlign = "right";
    context.fillText(label, this.right, this.bottom + 6);
  }

  beyond({ value, side }) {
    const { context } = this;
    const [y, edge] = [this.y(value), side === "below" ? this.bottom + 4 : TOP - 4];
    context.fillStyle = colour("over-shade");
    context.fillRect(LEFT, Math.min(y, edge), this.right - LEFT, Math.abs(y - edge));
  }

  limit({ value, label, side, isMirrored }) {
    const { context } = this;
    const [y, isAbove, isBelow] = [this.y(value), value > this.spec.y.max, value < this.spec.y.min];
    context.strokeStyle = colour("over");
    context.lineWidth = 1;
    context.setLineDash([5, 3]);
    this.path([[LEFT, y], [this.right, y]]);
    context.setLineDash([]);
    const isWrong = (y) => Number.isNaN(y) || (side === "below" ? y < value : y > value);
    const isBeyond = this.spec.series.every(({ ys }) => ys.every(isWrong));
    if (!isBeyond && (isMirrored || isAbove || isBelow)) return;
    const isUnder = isAbove || (!isBelow && (y - TOP < 14 || (side === "below" && this.bottom - y > 14)));
    context.textAlign = "left";
    context.textBaseline = isUnder ? "top" : "bottom";
    const text = isBeyond ? `all beyond ${label.replace("limit ", "")}` : label;
    const place = [text, LEFT + 4, Math.min(Math.max(y, TOP), this.bottom) + (isUnder ? 3 : -2)];
    context.strokeStyle = colour("card");
    context.lineWidth = 3;
    context.strokeText(...place);
    context.fillStyle = colour("over");
    context.fillText(...place);
  }

  band({ at, colour: name }) {
    const { context } = this;
    const width = Math.max(2, this.x(1) - this.x(0));
    context.fillStyle = colour(name);
    context.fillRect(this.x(at) - width / 2, TOP - 4, width, this.bottom - TOP + 8);
  }

  rule(at, name, dash) {
    const { context } = this;
    context.strokeStyle = colour(name);
    context.lineWidth = 1;
    context.setLineDash(dash);
    const x = Math.round(this.x(at)) + 0.5;
    this.path([[x, TOP - 4], [x, this.bottom + 4]]);
    context.setLineDash([]);
  }

  line({ xs, ys, colour: name, dash = [] }) {
    const { context } = this;
    context.strokeStyle = colour(name);
    context.fillStyle = colour("not-finite");
    context.lineWidth = 1.5;
    context.setLineDash(dash);
    context.beginPath();
    let isDown = false;
    for (const [x, low, high, isFinite] of this.columns(xs, ys)) {
      if (!isFinite) {
        // What is not finite has no height: it is marked at the upper edge.
        context.fillRect(x - 1, TOP - 4, 2, 7);
        isDown = false;
        continue;
      }
      if (low === null) isDown = false;
      else {
        if (isDown) context.lineTo(x, this.y(low));
        else context.moveTo(x, this.y(low));
        if (high !== low) context.lineTo(x, this.y(high));
        isDown = true;
      }
    }
    context.stroke();
    context.setLineDash([]);
    if (xs.length < 40) this.dots({ xs, ys, colour: name, size: 1.8 });
  }

  /** Yield a place, the lowest and highest value there: one a pixel, however many points. */
  *columns(xs, ys) {
    let [place, low, high, isFinite] = [null, null, null, true];
    for (let i = 0; i < xs.length; i += 1) {
      const x = Math.round(this.x(xs[i]) * 2) / 2;
      if (x !== place) {
        if (place !== null) yield [place, low, high, isFinite];
        [place, low, high, isFinite] = [x, null, null, true];
      }
      const value = ys[i];
      if (Number.isNaN(value)) continue;
      if (!Number.isFinite(value)) isFinite = false;
      else {
        low = low === null ? value : Math.min(low, value);
        high = high === null ? value : Math.max(high, value);
      }
    }
    if (place !== null) yield [place, low, high, isFinite];
  }

  dots({ xs, ys, colour: name, size }) {
    const { context } = this;
    context.fillStyle = colour(name);
    for (let i = 0; i < xs.length; i += 1) {
      if (!Number.isFinite(ys[i])) continue;
      context.beginPath();
      context.arc(this.x(xs[i]), this.y(ys[i]), size, 0, 2 * Math.PI);
      context.fill();
    }
  }

  stems({ xs, ys, colour: name }) {
    const { context } = this;
    const width = Math.max(1, Math.min(6, (this.x(1) - this.x(0)) * 0.6));
    const zero = this.y(0);
    context.fillStyle = colour(name);
    for (let i = 0; i < xs.length; i += 1) {
      if (!Number.isFinite(ys[i])) continue;
      const y = this.y(ys[i]);
      context.fillRect(this.x(xs[i]) - width / 2, Math.min(y, zero), width, Math.abs(y - zero));
    }
  }

  area({ xs, ys, colour: name }) {
    const { context } = this;
    const zero = this.y(0);
    context.beginPath();
    context.moveTo(this.x(xs[0]), zero);
    for (let i = 0; i < xs.length; i += 1) context.lineTo(this.x(xs[i]), this.y(ys[i]));
    context.lineTo(this.x(xs[xs.length - 1]), zero);
    context.fillStyle = colour(name);
    context.globalAlpha = 0.22;
    context.fill();
    context.globalAlpha = 1;
    this.line({ xs, ys, colour: name });
  }

  path(points) {
    const { context } = this;
    context.beginPath();
    points.forEach(([x, y], i) => (i ? context.lineTo(x, y) : context.moveTo(x, y)));
    context.stroke();
  }
}
