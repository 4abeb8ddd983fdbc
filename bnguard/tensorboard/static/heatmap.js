// The picture of a run: layers by steps on a canvas, each cell coloured by how close it is to the
// limit of its rule.

import { h, svg } from "./dom.js";
import { theme } from "./host.js";
import { ticks } from "./plot.js";
import { closeness, colourIndex, figure, palette } from "./scale.js";

/** The strip above the picture, for findings about the whole model. */
export const STRIP = 14;
const AXIS = 20;

const SEVERITY_SHAPES = {
  error: "M0,-6 L6,0 L0,6 L-6,0 Z",
  warning: "M0,-6 L6,5 L-6,5 Z",
  info: "M-4,0 a4,4 0 1,0 8,0 a4,4 0 1,0 -8,0 Z",
};

/** Return the shape of a severity, shown next to its word. */
export function severityIcon(severity) {
  const path = svg("path", { d: SEVERITY_SHAPES[severity] ?? SEVERITY_SHAPES.info });
  return svg(
    "svg",
    { class: `icon ${severity}`, viewBox: "-8 -8 16 16", "aria-hidden": "true" },
    path,
  );
}

/**
 * The cells of one run. `onPick(row, step)` and `onHover(row, step, event)` report the pointer.
 */
export class Heatmap {
  #canvas = h("canvas", { "aria-hidden": "true" });
  #overlay = svg("svg", { class: "overlay", "aria-hidden": "true" });
  #data = null;
  #rowHeight = 10;
  #width = 0;
  #chosen = { row: -1, step: null };

  constructor({ onPick, onHover, onMark }) {
    this.onMark = onMark;
    this.element = h("div", { class: "heat-cells" }, this.#canvas, this.#overlay);
    const place = (event) => this.#placeOf(event);
    this.#overlay.addEventListener("pointermove", (event) => onHover(place(event), event));
    this.#overlay.addEventListener("pointerleave", (event) => onHover(null, event));
    this.#overlay.addEventListener("click", (event) => {
      const at = place(event);
      if (at) onPick(at);
    });
    new ResizeObserver(() => {
      if (this.element.clientWidth !== this.#width) this.paint();
    }).observe(this.element);
  }

  /**
   * Show `{series, metric, columns, first, last, groups, marks}`: `columns[row]` is the column of
   * the series shown in a row, -1 if the run lacks the layer.
   */
  show(data, rowHeight) {
    this.#data = data;
    this.#rowHeight = rowHeight;
    this.element.style.height = `${STRIP + data.columns.length * rowHeight + AXIS}px`;
    this.paint();
  }

  /** Frame a row and rule a step. */
  choose(row, step) {
    this.#chosen = { row, step };
    this.#frame();
  }

  /** Return the share of the width at which a step lies. */
  #share(step) {
    const { first, last } = this.#data;
    return (step - first) / (last - first || 1);
  }

  #placeOf(event) {
    if (!this.#data) return null;
    const box = this.element.getBoundingClientRect();
    const { first, last, columns } = this.#data;
    const row = Math.floor((event.clientY - box.top - STRIP) / this.#rowHeight);
    if (row < 0 || row >= columns.length) return null;
    const share = Math.min(Math.max((event.clientX - box.left) / box.width, 0), 1);
    return { row, step: first + share * (last - first) };
  }

  /** Draw all cells; the overlay is drawn on top of them. */
  paint() {
    const data = this.#data;
    this.#width = this.element.clientWidth;
    if (!data || this.#width === 0) return;
    const ratio = window.devicePixelRatio || 1;
    const width = Math.round(this.#width * ratio);
    const rowHeight = Math.round(this.#rowHeight * ratio);
    const height = rowHeight * data.columns.length;
    this.#canvas.width = width;
    this.#canvas.height = height;
    Object.assign(this.#canvas.style, {
      top: `${STRIP}px`,
      width: `${this.#width}px`,
      height: `${data.columns.length * this.#rowHeight}px`,
    });
    const image = new ImageData(width, Math.max(height, 1));
    fillCells(image, data, rowHeight, palette(theme()));
    this.#canvas.getContext("2d").putImageData(image, 0, 0);
    this.#overlay.setAttribute("viewBox", `0 0 ${this.#width} ${this.element.clientHeight}`);
    this.#frame();
  }

  #frame() {
    const data = this.#data;
    if (!data || this.#width === 0) return;
    const [width, bottom] = [this.#width, STRIP + data.columns.length * this.#rowHeight];
    const parts = [
      ...data.groups.map((row) => {
        const y = STRIP + row * this.#rowHeight;
        return svg("line", { class: "group", x1: 0, x2: width, y1: y, y2: y });
      }),
      ...this.#axis(width, bottom),
      ...this.#chosenMarks(width, bottom),
      ...merged(data.marks, this.#rowHeight).flatMap((mark) => this.#mark(mark, width)),
    ];
    this.#overlay.replaceChildren(...parts);
  }

  #axis(width, bottom) {
    const { first, last } = this.#data;
    return ticks(first, last, Math.max(2, width / 110))
      .filter(Number.isInteger)
      .map((step) => {
        const x = this.#share(step) * width;
        const anchor = x < 20 ? "start" : x > width - 20 ? "end" : "middle";
        return svg("text", { x, y: bottom + 14, "text-anchor": anchor }, figure(step));
      });
  }

  #chosenMarks(width, bottom) {
    const { row, step } = this.#chosen;
    const parts = [];
    if (step !== null) {
      const x = this.#share(step) * width;
      for (const name of ["halo", "cursor"]) {
        parts.push(svg("line", { class: name, x1: x, x2: x, y1: STRIP - 3, y2: bottom + 3 }));
      }
    }
    if (row >= 0) {
      const y = STRIP + row * this.#rowHeight;
      for (const name of ["halo", "cursor"]) {
        parts.push(
          svg("rect", { class: name, x: 1, width: width - 2, y: y - 0.5, height: this.#rowHeight + 1 }),
        );
      }
    }
    return parts;
  }

  #mark({ finding, row, last, step }, width) {
    const x = Math.min(Math.max(this.#share(step) * width, 6), width - 6);
    const middle = (place) => (place < 0 ? STRIP / 2 : STRIP + (place + 0.5) * this.#rowHeight);
    const path = svg("path", {
      class: `mark ${finding.severity}`,
      d: SEVERITY_SHAPES[finding.severity],
      transform: `translate(${x} ${middle(row)})`,
      onclick: (event) => {
        event.stopPropagation();
        this.onMark(finding);
      },
    });
    path.append(svg("title", {}, `${finding.code} ${finding.severity}`));
    if (last === row) return [path];
    const ends = { x1: x, x2: x, y1: middle(row), y2: middle(last) };
    return [
      svg("line", { class: "halo", ...ends }),
      svg("line", { class: `reach ${finding.severity}`, ...ends }),
      path,
    ];
  }
}

/** Return marks with those of one rule and step joined where their rows are too thin to part them. */
function merged(marks, rowHeight) {
  const joined = [];
  for (const mark of [...marks].sort((a, b) => a.step - b.step || a.row - b.row)) {
    const before = joined[joined.length - 1];
    const isSame = before && before.step === mark.step && before.finding.code === mark.finding.code;
    if (isSame && before.row >= 0 && (mark.row - before.last) * rowHeight < 10) before.last = mark.row;
    else joined.push({ ...mark, last: mark.row });
  }
  return joined;
}

/** Colour the pixels: each column of pixels shows the worst of the steps it spans. */
function fillCells(image, { series, metric, columns, first, last }, rowHeight, { first: even, second: odd }) {
  const { width } = image;
  const pixels = new Uint32Array(image.data.buffer);
  const [count, layers] = series.shape;
  const close = closeness(metric, metric.largest);
  const bins = pixelBins(series.steps, first, last, width);
  const line = new Uint16Array(width);
  columns.forEach((column, row) => {
    for (let x = 0; x < width; x += 1) {
      let [worst, index] = [-1, colourIndex(NaN, NaN)];
      for (let i = bins[2 * x]; i < bins[2 * x + 1] && i < count && column >= 0; i += 1) {
        const value = series.values[i * layers + column];
        if (Number.isNaN(value)) continue;
        const size = Number.isFinite(value) ? close(value) : Infinity;
        if (size > worst) [worst, index] = [size, colourIndex(value, size)];
      }
      line[x] = index;
    }
    for (let y = row * rowHeight; y < (row + 1) * rowHeight; y += 1) {
      for (let x = 0; x < width; x += 1) {
        const table = ((x + y) >> 1) & 1 ? odd : even;
        pixels[y * width + x] = table[line[x]];
      }
    }
  });
}

/** Return, for each column of pixels, the first step and the one after the last that it spans. */
function pixelBins(steps, first, last, width) {
  const bins = new Int32Array(2 * width);
  const span = last - first || 1;
  let from = 0;
  for (let x = 0; x < width; x += 1) {
    const end = first + ((x + 1) / width) * span;
    let to = from;
    while (to < steps.length && (steps[to] < end || x === width - 1)) to += 1;
    // A logged value holds until the next one; outside the run's steps there is none.
    const holds = to === from && from > 0 && from < steps.length;
    bins[2 * x] = holds ? from - 1 : from;
    bins[2 * x + 1] = holds ? from : to;
    from = to;
  }
  return bins;
}
