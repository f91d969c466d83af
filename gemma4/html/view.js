// SPDX-License-Identifier: Apache-2.0
// What pictures do when pointed at, clicked and steered by keys. Every listener is the document's, so that pictures which
// a notebook inserts later, or several times, need no start of their own. Without this script they still show everything
// but what is enlarged. Text reaches the page through textContent alone.
(() => {
  "use strict";
  if (window.gemma4View) return;
  window.gemma4View = true;

  const make = (name, className, text) => {
    const made = document.createElement(name);
    made.className = className || "";
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const near = (event, selector) => event.target instanceof Element ? event.target.closest(selector) : null;

  const isNone = (x) => x === null || Number.isNaN(x);

  const number = (x) => { // as `number` in markup.py
    if (isNone(x)) return "nan";
    if (!Number.isFinite(x)) return String(x);
    if (x === 0) return "0";
    const size = Math.abs(x);
    if (size < 1e-3 || size >= 1e6) return x.toExponential(2);
    return x.toFixed(Math.max(0, 2 - Math.floor(Math.log10(size))));
  };

  const paint = (element, value, limit) => { // as `colour` in markup.py
    element.classList.toggle("g4-nan", isNone(value));
    element.classList.toggle("g4-neg", !isNone(value) && value < 0);
    element.style.setProperty("--v", isNone(value) ? 0 : Math.min(1, Math.abs(value) / limit));
  };

  // ---- what is pointed at

  const tip = make("div", "g4-tip");
  tip.id = "g4-tip";
  tip.setAttribute("role", "tooltip");
  tip.hidden = true;

  const say = (text, x, y) => {
    if (!tip.isConnected) document.body.append(tip);
    tip.textContent = text;
    tip.hidden = false;
    const { width, height } = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(x + 14, window.innerWidth - width - 8))}px`;
    tip.style.top = `${y + 18 + height < window.innerHeight ? y + 18 : Math.max(4, y - height - 10)}px`;
  };
  let focused = null; // the cell that the hint belongs to, if keys reached it
  const hush = () => {
    tip.hidden = true;
    focused = null;
  };

  const noteOf = (element) => { // the browser's own hint, which comes late and not to keys, becomes ours
    const noted = element.closest(".g4 [title], .g4 [data-tip]");
    if (!noted) return null;
    if (noted.title) {
      noted.dataset.tip = noted.title;
      noted.removeAttribute("title");
    }
    return noted;
  };

  const sayOf = (element, x, y) => {
    const noted = noteOf(element);
    if (noted) say(noted.dataset.tip, x, y);
    else hush();
  };

  const sayFocused = () => {
    const box = focused.getBoundingClientRect();
    sayOf(focused, box.left, box.bottom - 14);
  };

  document.addEventListener("pointermove", (event) => {
    if (!(event.target instanceof Element) || !event.target.closest(".g4")) return hush();
    const image = event.target.closest(".g4-head img, .g4-map");
    if (image) return pointAt(image, event);
    sayOf(event.target, event.clientX, event.clientY);
  });
  document.addEventListener("pointerover", (event) => {
    const token = near(event, ".g4-stage .g4-t");
    if (token) lookFromToken(token);
  });
  document.addEventListener("focusin", (event) => {
    const cell = near(event, ".g4-cells [tabindex]");
    if (!cell) return hush();
    focused = cell;
    sayFocused();
    cell.setAttribute("aria-describedby", tip.id);
    if (cell.closest(".g4-stage")) lookFromToken(cell);
  });
  document.addEventListener("scroll", () => focused ? sayFocused() : hush(), true); // focus itself may scroll

  // ---- keys: arrows move among the cells of a table and among tokens

  const STEPS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };

  const beside = (cell, [down, right]) => {
    const row = cell.closest("tr");
    if (!row) return down + right > 0 ? cell.nextElementSibling : cell.previousElementSibling;
    if (right) return right > 0 ? cell.nextElementSibling : cell.previousElementSibling;
    const other = down > 0 ? row.nextElementSibling : row.previousElementSibling;
    return other && other.children[[...row.children].indexOf(cell)];
  };

  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      hush();
      const stage = near(event, ".g4-attention");
      if (stage) enlarge(stage, null);
      return;
    }
    const step = STEPS[event.key];
    const map = near(event, ".g4-map");
    const cells = near(event, ".g4-cells");
    if (!step || (!map && !cells)) return;
    if (map) {
      event.preventDefault();
      return walk(map, step);
    }
    const now = event.target.closest("[tabindex='-1']");
    const next = now ? beside(now, step) : cells.querySelector("[tabindex='-1']");
    if (!next || !next.hasAttribute("tabindex")) return;
    event.preventDefault();
    next.focus();
  });

  // ---- attention patterns

  const facts = new WeakMap();
  const factsOf = (root) => { // texts of queries and keys, and which key each query is
    const parsed = () => Object.fromEntries(["queries", "keys", "at"].map((name) => [name, JSON.parse(root.dataset[name])]));
    if (!facts.has(root)) facts.set(root, parsed());
    return facts.get(root);
  };
  const valuesOf = (head) => {
    if (!facts.has(head)) {
      const bytes = atob(head.dataset.v);
      const top = Number(head.dataset.top) / 65535;
      const lost = atob(head.dataset.nan || ""); // a bit for each number, if one of them is none
      const isLost = (i) => lost && (lost.charCodeAt(i >> 3) >> (7 - (i & 7))) & 1;
      const at = (i) => isLost(i) ? NaN : (bytes.charCodeAt(2 * i) + 256 * bytes.charCodeAt(2 * i + 1)) * top;
      facts.set(head, Float32Array.from({ length: bytes.length / 2 }, (_, i) => at(i)));
    }
    return facts.get(head);
  };
  const openHead = (root) => root.querySelector(".g4-head[aria-expanded='true']");
  const sentence = (root, head, query, key) => {
    const { queries, keys } = factsOf(root);
    return `${head.dataset.name}: ${queries[query]} (${query}) \u2192 ${keys[key]} (${key})  ${number(valuesOf(head)[query * keys.length + key])}`;
  };

  const pointAt = (image, event) => {
    const root = image.closest(".g4-attention");
    const { queries, keys } = factsOf(root);
    const box = (image.querySelector("img") || image).getBoundingClientRect();
    const key = Math.floor(((event.clientX - box.left) / box.width) * keys.length);
    const query = Math.floor(((event.clientY - box.top) / box.height) * queries.length);
    if (key < 0 || query < 0 || key >= keys.length || query >= queries.length) return hush();
    const head = image.closest(".g4-head") || openHead(root);
    say(sentence(root, head, query, key), event.clientX, event.clientY);
    if (image.matches(".g4-map")) cross(root, query, key);
  };

  const cross = (root, query, key) => {
    const map = root.querySelector(".g4-map");
    const side = Number(map.dataset.side);
    const mark = map.querySelector(".g4-cross");
    map.dataset.query = query;
    map.dataset.key = key;
    mark.hidden = false;
    Object.assign(mark.style, { left: `${key * side}px`, top: `${query * side}px`, width: `${side}px`, height: `${side}px` });
    root.querySelector(".g4-said").textContent = sentence(root, openHead(root), query, key);
    lookFrom(root, query);
  };

  const walk = (map, [down, right]) => {
    const root = map.closest(".g4-attention");
    const { queries, keys } = factsOf(root);
    const within = (x, n) => Math.max(0, Math.min(n - 1, x));
    const query = within(Number(map.dataset.query) + down, queries.length);
    cross(root, query, within(Number(map.dataset.key) + right, keys.length));
  };

  const lookFrom = (root, query) => { // the tokens below, in the colour of the attention that the query gives them
    const { keys, at } = factsOf(root);
    const head = openHead(root);
    const values = valuesOf(head);
    root.querySelectorAll(".g4-stage .g4-t").forEach((token, key) => {
      paint(token, values[query * keys.length + key], Number(head.dataset.top));
      token.dataset.tip = sentence(root, head, query, key);
      token.classList.toggle("g4-on", key === at[query]);
    });
  };

  const lookFromToken = (token) => {
    const root = token.closest(".g4-attention");
    const query = factsOf(root).at.indexOf([...token.parentNode.children].indexOf(token));
    if (query >= 0) lookFrom(root, query);
  };

  const label = (text, side, axis) => {
    const made = make("span", "", text);
    made.style[axis] = made.style.lineHeight = `${side}px`;
    if (side < 9) made.style.visibility = "hidden";
    return made;
  };

  const enlarge = (root, head) => {
    const stage = root.querySelector(".g4-stage");
    const before = openHead(root);
    if (before) before.setAttribute("aria-expanded", "false");
    stage.replaceChildren();
    stage.hidden = !head || head === before;
    if (stage.hidden) return before && before.focus();
    head.setAttribute("aria-expanded", "true");
    const { queries, keys } = factsOf(root);
    const side = Math.max(3, Math.min(22, Math.floor(820 / keys.length)));
    const map = make("div", "g4-map");
    const image = make("img");
    Object.assign(image, { src: head.querySelector("img").src, alt: "", width: side * keys.length, height: side * queries.length });
    image.style.width = `${image.width}px`;
    image.style.height = `${image.height}px`;
    map.append(image, make("div", "g4-cross"));
    Object.assign(map.dataset, { side, query: 0, key: 0 });
    map.tabIndex = 0;
    map.setAttribute("role", "application");
    map.setAttribute("aria-label", `${head.dataset.name}: rows are queries, columns keys; arrow keys move`);
    const ys = make("div", "g4-ys");
    ys.append(...queries.map((text) => label(text, side, "height")));
    const xs = make("div", "g4-xs");
    xs.append(...keys.map((text) => label(text, side, "width")));
    const plot = make("div", "g4-plot");
    plot.append(xs, ys, map);
    const said = make("output", "g4-said");
    said.setAttribute("aria-live", "polite");
    const tokens = make("div", "g4-cells g4-tokens");
    tokens.tabIndex = 0;
    tokens.setAttribute("role", "group");
    tokens.setAttribute("aria-label", `${head.dataset.name}: tokens, coloured by attention from the one in the frame`);
    for (const text of keys) {
      const token = make("span", "g4-c g4-t", text);
      token.tabIndex = -1;
      tokens.append(token);
    }
    stage.append(make("strong", "", head.dataset.name), plot, said, tokens);
    cross(root, queries.length - 1, keys.length - 1);
  };

  // ---- clicks, choices, search

  const sortRows = (button) => {
    const body = button.closest(".g4-ranked").querySelector("tbody");
    const sorted = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(sorted));
    const order = (row) => sorted ? -Math.abs(Number(row.dataset.v)) : Number(row.dataset.i);
    body.append(...[...body.children].sort((a, b) => order(a) - order(b)));
  };

  const cardsBeside = (element) => [...element.closest(".g4-picture").querySelectorAll(".g4-card")];

  const follow = (link) => { // another picture of the document may have a card of the same number
    const card = cardsBeside(link).find((one) => one.dataset.feature === link.dataset.to);
    if (!card) return;
    card.hidden = false;
    card.focus({ preventScroll: true });
    card.scrollIntoView();
  };

  document.addEventListener("click", (event) => {
    const head = near(event, ".g4-head");
    if (head) return enlarge(head.closest(".g4-attention"), head);
    const sort = near(event, ".g4-sort");
    if (sort) sortRows(sort);
    const link = near(event, ".g4-link");
    if (link) follow(link);
    const cell = near(event, ".g4-cells [tabindex='-1']");
    if (cell) cell.focus();
  });

  document.addEventListener("change", (event) => {
    const choice = near(event, ".g4-series");
    if (!choice) return;
    const root = choice.closest(".g4-shaded");
    const { values, limit, name } = JSON.parse(root.dataset.series)[choice.selectedIndex];
    root.querySelectorAll(".g4-t").forEach((token, i) => {
      paint(token, values[i], limit);
      noteOf(token).dataset.tip = `${token.textContent} (${i})\n${name}: ${number(values[i])}`;
    });
    root.querySelector(".g4-high").textContent = number(limit);
    root.querySelector(".g4-low").textContent = values.some((x) => x < 0) ? number(-limit) : "0";
    root.querySelector(".g4-key i").className = values.some((x) => x < 0) ? "g4-two" : "g4-one";
  });

  document.addEventListener("input", (event) => {
    const field = near(event, ".g4-search");
    if (!field) return;
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    const cards = cardsBeside(field);
    for (const card of cards) {
      const text = card.dataset.search || (card.dataset.search = card.textContent.toLowerCase());
      card.hidden = !words.every((word) => text.includes(word));
    }
    const left = cards.filter((card) => !card.hidden).length;
    field.closest("p").querySelector("output").textContent = `${left} of ${cards.length}`;
  });
})();
