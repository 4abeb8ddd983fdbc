// Elements of the page. Names come from untrusted logs: they become text, never markup.

const SVG = "http://www.w3.org/2000/svg";

/** Return an element with attributes, listeners (`onclick: f`) and children (elements or text). */
export function h(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

/** Return an SVG element, as `h` does. */
export function svg(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name.slice(2), value);
    else if (name.startsWith("aria-")) element.setAttribute(name, String(value));
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) {
      element.setAttribute(name, String(value));
    }
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

// Control characters, and those that turn the direction of writing or take no room.
const UNSEEN = /[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g;

/** Return a text of a log for use in a line: without invisible characters, and not endless. */
export function shown(text, most = 200) {
  const visible = String(text).replace(UNSEEN, "\ufffd");
  if (visible.length <= most) return visible;
  const half = Math.floor((most - 1) / 2);
  return `${visible.slice(0, half)}…${visible.slice(-half)}`;
}

/** Return the name of a layer for people. */
export function layerName(name, most = 200) {
  return name === "" ? "(the model itself)" : shown(name, most);
}

/** Return a layer in words, null for the model; a name without letters would read as a number. */
export function layerLabel(name) {
  if (name === null) return "the whole model";
  return name && !/\p{L}/u.test(name) ? `layer ${shown(name, 40)}` : layerName(name, 40);
}

/** Return a number of things in words: "1 layer", "2 layers". */
export function counted(number, noun) {
  return `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
}

/** Return a button that copies what `textOf` returns, and says that it did. */
export function copyButton(textOf, label, face = "Copy") {
  const button = h("button", { class: "quiet", type: "button", "aria-label": label }, face);
  button.addEventListener("click", async () => {
    button.textContent = (await copied(textOf())) ? "Copied" : "Not allowed";
    setTimeout(() => (button.textContent = face), 1500);
  });
  return button;
}

/** Copy a text, and return whether that was allowed. */
async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // A page that is not served over https, or a frame, may not use the clipboard.
    const area = h("textarea", { class: "unseen" });
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}
