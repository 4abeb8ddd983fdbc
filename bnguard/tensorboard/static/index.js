// The entry of the tab: TensorBoard imports this module into a frame, and calls render().

import { start } from "./app.js";
import { h } from "./dom.js";
import { ServerSource } from "./source.js";

/** Draw the tab. */
export async function render() {
  const style = h("link", { rel: "stylesheet", href: new URL("style.css", import.meta.url) });
  await new Promise((done) => {
    style.addEventListener("load", done);
    style.addEventListener("error", done);
    document.head.append(style);
  });
  document.documentElement.lang = "en";
  document.title = "BatchNorm";
  await start(document.body, new ServerSource());
}
