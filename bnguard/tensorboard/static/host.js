// What is around the page: TensorBoard, which has a theme, an address and a reload button.

const PREFIX = "p.bnguard.";

/** Set the theme of the page to that of TensorBoard, and keep it so; calls back on changes. */
export function followTheme(onChange) {
  const system = matchMedia("(prefers-color-scheme: dark)");
  const host = hostWindow()?.document.body;
  const apply = () => {
    const isDark = host ? host.classList.contains("dark-mode") : system.matches;
    document.documentElement.dataset.theme = isDark ? "dark" : "light";
    onChange();
  };
  if (host) {
    new MutationObserver(apply).observe(host, { attributes: true, attributeFilter: ["class"] });
  } else system.addEventListener("change", apply);
  apply();
}

/** Return the theme of the page: "light" or "dark". */
export function theme() {
  return document.documentElement.dataset.theme === "dark" ? "dark" : "light";
}

/** Return the parameters of the address that are ours. */
export function readLink() {
  const parameters = {};
  for (const [key, value] of new URLSearchParams(hashParts().join("&"))) {
    if (key.startsWith(PREFIX)) parameters[key.slice(PREFIX.length)] = value;
  }
  return parameters;
}

/** Put parameters into the address, next to those of others, and return the address. */
export function writeLink(parameters) {
  const target = hostWindow() ?? window;
  const own = Object.entries(parameters).map(
    ([key, value]) => `${PREFIX}${key}=${encodeURIComponent(value)}`,
  );
  const others = hashParts().filter((part) => !part.startsWith(PREFIX));
  const name = hostWindow() ? "bnguard" : "";
  const parts = [...(others.length ? others : [name]), ...own].filter(Boolean);
  const address = new URL(target.location.href);
  address.hash = parts.join("&");
  // While another tab of TensorBoard is shown, the address is not ours to change.
  if (isVisible() && address.href !== target.location.href) {
    target.history.replaceState(target.history.state, "", address);
  }
  return address.href;
}

/** Call back when TensorBoard has read new data, and the page can be seen. */
export function onReload(callback) {
  if (!hostWindow()) return;
  const { port1, port2 } = new MessageChannel();
  port1.onmessage = ({ data }) => {
    const { type, id, isReply } = JSON.parse(data);
    if (isReply) return;
    port1.postMessage(JSON.stringify({ type, id, payload: null, error: null, isReply: true }));
    if (type === "experimental.DataReloaded" && isVisible()) callback();
  };
  hostWindow().postMessage("experimental.bootstrap", location.origin, [port2]);
}

/** Return whether the page can be seen; the frame of a hidden tab has no height. */
export function isVisible() {
  return !document.hidden && document.documentElement.clientHeight > 0;
}

function hashParts() {
  const target = hostWindow() ?? window;
  return target.location.hash.replace(/^#/, "").split("&").filter(Boolean);
}

function hostWindow() {
  try {
    // In a frame of another origin the access throws.
    return window.parent !== window && window.parent.document.body ? window.parent : null;
  } catch {
    return null;
  }
}
