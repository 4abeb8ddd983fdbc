// Where the page gets its data: TensorBoard's server, or the page itself.

/** Return a packed series: `{shape, names, steps, values}`; see `Series.pack` in reader.py. */
function unpack(buffer, read = (bytes, start) => new Float32Array(bytes, start)) {
  const length = new DataView(buffer).getUint32(0, true);
  const head = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  const count = head.shape[0];
  const steps = new Float64Array(buffer, 4 + length, count);
  const values = read(buffer, 4 + length + 8 * count, count);
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
    return JSON.parse(new TextDecoder().decode(await inflated(this.#data.rules)));
  }

  async run(name) {
    const { run, problems } = this.#entry(name);
    return { ...JSON.parse(new TextDecoder().decode(await inflated(run))), problems };
  }

  stats(run, metric) {
    const row = run.metrics.findIndex(({ key }) => key === metric);
    return this.#slice(run, run.layers.length, (layer) => [row, layer]);
  }

  layer(run, layer) {
    const column = run.layers.indexOf(layer);
    return this.#slice(run, run.metrics.length, (row) => [row, column]);
  }

  async channels(run, layer) {
    const { channels } = this.#entry(run.name);
    if (!Object.hasOwn(channels, layer)) throw new Error("this was left out of the page");
    return unpack(await inflated(channels[layer]), halves);
  }

  /** Return `size` numbers of each step: `placeOf` says in which row and column they are. */
  async #slice(run, size, placeOf) {
    const entry = this.#entry(run.name);
    entry.unpacked ??= inflated(entry.stats).then((buffer) => unpack(buffer, singles));
    const { steps, values: all } = await entry.unpacked;
    const values = new Float32Array(steps.length * size);
    for (let i = 0; i < values.length; i += 1) {
      const [row, column] = placeOf(i % size);
      values[i] = all[(Math.floor(i / size) * run.metrics.length + row) * run.layers.length + column];
    }
    return { shape: [steps.length, size], steps, values };
  }

  #entry(name) {
    const entry = this.#data.runs.find(({ listed }) => listed.name === name);
    if (!entry) throw new Error(`there is no run ${name} in this page`);
    return entry;
  }
}

/** Return the bytes of a compressed text. */
function inflated(text) {
  const bytes = Uint8Array.from(atob(text), (char) => char.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
}

/** Return numbers in the order of steps, from bytes that are packed as in log_report.py. */
function ordered(buffer, start, steps, size) {
  const packed = new Uint8Array(buffer, start);
  const bytes = new Uint8Array(packed.length);
  const [count, each] = [packed.length / size, packed.length / size / steps];
  for (let i = 0; i < count; i += 1) {
    const place = (i % steps) * each + Math.floor(i / steps);
    for (let byte = 0; byte < size; byte += 1) bytes[place * size + byte] = packed[byte * count + i];
  }
  return bytes.buffer;
}

function singles(buffer, start, steps) {
  return new Float32Array(ordered(buffer, start, steps, 4));
}

/** Return half-precision numbers as float32. */
function halves(buffer, start, steps) {
  return Float32Array.from(new Uint16Array(ordered(buffer, start, steps, 2)), (bits) => {
    const [sign, exponent, fraction] = [bits >> 15 ? -1 : 1, (bits >> 10) & 31, bits & 1023];
    if (exponent === 31) return fraction ? NaN : sign * Infinity;
    return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -24 * fraction);
  });
}
