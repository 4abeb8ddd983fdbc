// Where the page gets its data: TensorBoard's server, or the page itself.

/** Return a packed series: `{shape, names, steps, values}`; see `Series.pack` in decoding.py. */
export function unpack(buffer, read = (bytes, start) => new Float32Array(bytes, start)) {
  const length = new DataView(buffer).getUint32(0, true);
  const head = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  const count = head.shape[0];
  const steps = new Float64Array(buffer, 4 + length, count);
  const values = read(buffer, 4 + length + 8 * count);
  return { shape: head.shape, names: head.names, steps, values };
}

/** Reads from the plugin's server; what was read is kept until the run changes. */
export class ServerSource {
  isLive = true;
  #kept = new Map();

  runs() {
    return this.#get("runs", {}, asJson);
  }

  rules() {
    return this.#keep("rules", {}, "", asJson);
  }

  run(name, version) {
    return this.#keep("run", { run: name }, version, asJson);
  }

  stats(run, metric) {
    return this.#keep("stats", { run: run.name, metric }, run.version, asSeries);
  }

  layer(run, layer) {
    return this.#keep("layer", { run: run.name, layer }, run.version, asSeries);
  }

  channels(run, layer) {
    return this.#keep("channels", { run: run.name, layer }, run.version, asSeries);
  }

  #keep(path, query, version, decode) {
    const key = JSON.stringify([path, query]);
    const known = this.#kept.get(key);
    if (known && known.version === version) return known.answer;
    const answer = this.#get(path, query, decode);
    this.#kept.delete(key);
    this.#kept.set(key, { version, answer });
    answer.catch(() => this.#kept.delete(key));
    if (this.#kept.size > 64) this.#kept.delete(this.#kept.keys().next().value);
    return answer;
  }

  async #get(path, query, decode) {
    // Relative to this module, so that it holds under a path prefix and in a notebook.
    const url = new URL(`../${path}`, import.meta.url);
    url.search = new URLSearchParams(query);
    let response;
    try {
      response = await fetch(url);
    } catch {
      throw new Error("TensorBoard does not answer; is it still running?");
    }
    if (!response.ok) {
      throw new Error((await response.text()) || `TensorBoard answered ${response.status}`);
    }
    return decode(response);
  }
}

const asJson = (response) => response.json();
const asSeries = async (response) => unpack(await response.arrayBuffer());

/** Reads from what `bnguard report --html` put into the page. */
export class EmbeddedSource {
  isLive = false;
  #data;

  constructor(data) {
    this.#data = data;
  }

  async runs() {
    return this.#data.runs.map(({ listed }) => listed);
  }

  async rules() {
    return this.#data.rules;
  }

  async run(name) {
    return this.#entry(name).run;
  }

  async stats(run, metric) {
    return this.#series(this.#entry(run.name).stats, metric);
  }

  async layer(run, layer) {
    const metrics = await Promise.all(run.metrics.map(({ key }) => this.stats(run, key)));
    const column = run.layers.indexOf(layer);
    const { steps } = metrics[0];
    const values = new Float32Array(steps.length * metrics.length);
    for (let i = 0; i < steps.length; i += 1) {
      metrics.forEach((series, row) => {
        values[i * metrics.length + row] = series.values[i * run.layers.length + column];
      });
    }
    return { shape: [steps.length, metrics.length], names: [], steps, values };
  }

  async channels(run, layer) {
    return this.#series(this.#entry(run.name).channels, layer, halves);
  }

  #entry(name) {
    const entry = this.#data.runs.find(({ run }) => run.name === name);
    if (!entry) throw new Error(`there is no run ${name} in this page`);
    return entry;
  }

  async #series(packed, key, read) {
    if (!Object.hasOwn(packed, key)) throw new Error("this was left out of the page");
    const bytes = Uint8Array.from(atob(packed[key]), (char) => char.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return unpack(await new Response(stream).arrayBuffer(), read);
  }
}

/** Return the half-precision numbers from a place on, as float32. */
function halves(buffer, start) {
  return Float32Array.from(new Uint16Array(buffer, start), (bits) => {
    const [sign, exponent, fraction] = [bits >> 15 ? -1 : 1, (bits >> 10) & 31, bits & 1023];
    if (exponent === 31) return fraction ? NaN : sign * Infinity;
    return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -24 * fraction);
  });
}
