"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const PAGE = 100, DEPTH = 4, MOST_TILES = 800, MOST_CHILDREN = 160, LEAST_AREA = 600;
  const TIED = data.statuses.indexOf("tied");
  const $ = (id) => document.getElementById(id);
  const say = (words) => { $("say").textContent = words; };

  // Every name goes into the page as text, never as markup.
  const make = (tag, attributes = {}, ...children) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name === "class") element.className = value;
      else if (name === "on") for (const [event, act] of Object.entries(value)) element.addEventListener(event, act);
      else element.setAttribute(name, value);
    }
    element.append(...children);
    return element;
  };
  const count = (n) => n.toLocaleString("en");
  const short = (n) => {
    for (const [unit, size] of [["G", 1e9], ["M", 1e6], ["k", 1e3]]) {
      if (n >= size) return `${(n / size).toPrecision(3)} ${unit}`;
    }
    return String(n);
  };
  const plural = (n, word) => `${count(n)} ${word}${n === 1 ? "" : "s"}`;
  const slug = (status) => `s-${data.statuses[status].replaceAll(" ", "-")}`;

  const entries = data.entries, total = entries.name.length;
  const numel = (i) => data.shapes[entries.shape[i]][1];
  const keysOf = (i) => entries.keys[i] === 0 ? [entries.name[i]] : entries.keys[i];

  // ---- The module tree ------------------------------------------------------------------------------------------
  const node = (name, path, parent) =>
    ({ name, path, parent, children: new Map(), rows: 0, frozen: 0, elements: 0, by: data.statuses.map(() => [0, 0]) });
  const root = node(data.model, "", null);
  for (let i = 0; i < total; i++) {
    let at = root;
    const add = () => {
      const own = numel(i), by = at.by[entries.status[i]];
      at.rows++;
      at.frozen += entries.frozen[i];
      at.elements += entries.status[i] === TIED ? 0 : own;
      by[0] += own;
      by[1]++;
    };
    add();
    let path = "";
    for (const segment of entries.name[i].split(".")) {
      path = path ? `${path}.${segment}` : segment;
      if (!at.children.has(segment)) at.children.set(segment, node(segment || "(no name)", path, at));
      at = at.children.get(segment);
      add();
    }
  }
  const find = (path) => {
    let at = root;
    if (path) for (const segment of path.split(".")) at = at.children.get(segment);
    return at;
  };

  const state = { path: "", search: "", statuses: new Set(), frozen: false, size: 0 };

  // ---- The map --------------------------------------------------------------------------------------------------
  const weight = (n) => n.by.reduce((sum, by) => sum + by[state.size], 0);
  // A module that holds one module only is shown as one: encoder.layer.
  const chained = (n) => {
    let at = n, name = n.name;
    while (at.children.size === 1) {
      const [only] = at.children.values();
      if (!only.children.size) break;
      at = only;
      name += `.${only.name}`;
    }
    return at === n ? n : { ...at, name };
  };

  // Squarified treemap: Bruls, Huizing and van Wijk (2000).
  const squarify = (items, box) => {
    const out = [];
    let { x, y, w, h } = box, rest = items.reduce((sum, item) => sum + item.weight, 0), start = 0;
    while (start < items.length) {
      const side = Math.min(w, h), scale = (w * h) / rest;
      let sum = 0, end = start, worst = Infinity;
      while (end < items.length) {
        const next = sum + items[end].weight * scale;
        const most = items[start].weight * scale, least = items[end].weight * scale;
        const ratio = Math.max((side * side * most) / (next * next), (next * next) / (side * side * least));
        if (ratio > worst) break;
        worst = ratio;
        sum = next;
        end++;
      }
      const thick = side > 0 ? sum / side : 0;
      let along = 0;
      for (let i = start; i < end; i++) {
        const length = sum > 0 ? (items[i].weight * scale / sum) * side : 0;
        out.push(w >= h ? { item: items[i], x, y: y + along, w: thick, h: length }
                        : { item: items[i], x: x + along, y, w: length, h: thick });
        along += length;
        rest -= items[i].weight;
      }
      if (w >= h) { x += thick; w -= thick; } else { y += thick; h -= thick; }
      start = end;
    }
    return out;
  };

  const words = (n) => {
    const kinds = n.by.map(([, tensors], s) => tensors ? `${count(tensors)} ${data.statuses[s]}` : "").filter(Boolean);
    if (!n.children.size && n.rows === 1) {
      return `tensor, ${plural(n.by.reduce((sum, by) => sum + by[0], 0), "element")}: ` +
        `${data.statuses[n.by.findIndex((by) => by[1])]}${n.frozen ? ", frozen" : ""}`;
    }
    return `module, ${plural(n.rows, "tensor")}, ${short(n.elements)} elements: ${kinds.join(", ")}` +
      (n.frozen ? `; ${n.frozen === n.rows ? "all" : count(n.frozen)} frozen` : "");
  };

  let tiles = [], budget = 0, width = 0;
  const shown = (n, box) => {
    // A head of a few thousand elements beside an encoder of millions has to be seen: no area is smaller than this.
    const least = Math.min(0.015, 0.3 / n.children.size) * (weight(n) || 1);
    const all = [...n.children.values()].map(chained).map((each) => ({ node: each, weight: Math.max(weight(each), least) }));
    all.sort((a, b) => b.weight - a.weight);
    const most = Math.max(2, Math.min(MOST_CHILDREN, Math.floor((box.w * box.h) / LEAST_AREA)));
    if (all.length <= most) return all;
    const rest = all.splice(most - 1);
    const merged = node(`${count(rest.length)} more`, n.path, n);
    for (const { node: each } of rest) {
      merged.rows += each.rows;
      merged.frozen += each.frozen;
      merged.elements += each.elements;
      each.by.forEach((by, s) => { merged.by[s][0] += by[0]; merged.by[s][1] += by[1]; });
    }
    return [...all, { node: merged, weight: rest.reduce((sum, r) => sum + r.weight, 0), rest: true }];
  };

  const draw = (item, box, depth, map) => {
    const n = item.node, big = box.w > 64 && box.h > 48 && depth < DEPTH - 1 && budget > 0;
    const nested = n.children.size > 0 && big && !item.rest;
    const present = data.statuses.map((_, s) => s).filter((s) => n.by[s][1]);
    const one = present.length === 1;
    const title = one && !nested ? `${n.name} ${data.statuses[present[0]]}` : n.name;
    const tile = make("button", {
      type: "button", class: "tile", tabindex: "-1", "data-path": n.path,
      ...(depth ? { "aria-hidden": "true" } : { "aria-label": `${title}, ${item.rest ? "in the table: " : ""}${words(n)}` }),
    });
    tile.node = n;
    Object.assign(tile.style, {
      left: `${box.x}px`, top: `${box.y}px`, width: `${Math.max(box.w - 1, 1)}px`, height: `${Math.max(box.h - 1, 1)}px`,
    });
    if (n.frozen === n.rows && n.rows) tile.classList.add("frozen");
    budget--;
    map.append(tile);
    if (depth === 0) tiles.push(tile);
    const label = make("span", { class: "label", "aria-hidden": "true" }, n.name);
    if (nested) {
      tile.classList.add("module");
      tile.append(label);
      const inside = { x: box.x + 3, y: box.y + 21, w: box.w - 7, h: box.h - 25 };
      for (const each of squarify(shown(n, inside), inside)) draw(each.item, each, depth + 1, map);
      return;
    }
    const bands = make("span", { class: "bands", "aria-hidden": "true" });
    for (const s of present) {
      const off = (state.statuses.size && !state.statuses.has(s)) || (state.frozen && !n.frozen);
      const band = make("span", { class: `${slug(s)}${off ? " dim" : ""}` });
      band.style.flex = String(Math.max(n.by[s][state.size], 0.01));
      bands.append(band);
    }
    tile.append(bands);
    if (box.w > 40 && box.h > 20) {
      const dim = one && bands.firstChild.classList.contains("dim");
      if (one && !dim) label.classList.add(slug(present[0]));
      else tile.classList.add("mixed");
      tile.append(label);
      if (box.h > 44 && box.w > 60 && one) {
        tile.append(" ", make("span", { class: `what ${dim ? "plainly" : slug(present[0])}`, "aria-hidden": "true" }, data.statuses[present[0]]));
      }
    }
  };

  const drawMap = () => {
    const map = $("map"), current = find(state.path);
    const held = map.contains(document.activeElement) ? document.activeElement.dataset.path : null;
    tiles = [];
    width = map.clientWidth;
    map.replaceChildren();
    const box = { x: 0, y: 0, w: map.clientWidth, h: map.clientHeight };
    const items = current.children.size ? shown(current, box) : [{ node: current, weight: 1 }];
    for (const each of squarify(items, box)) {
      budget = MOST_TILES / items.length;
      draw(each.item, each, 0, map);
    }
    if (tiles.length) tiles[0].tabIndex = 0;
    if (held !== null && tiles.length) focus(tiles.find((tile) => tile.dataset.path === held) || tiles[0]);
    $("detail").textContent = `${state.path || root.name}: ${words(current)}`;
  };

  const drawCrumbs = () => {
    const chain = [];
    for (let n = find(state.path); n; n = n.parent) chain.unshift(n);
    $("crumbs").replaceChildren(...chain.map((n, i) => make("li", {}, i === chain.length - 1
      ? make("span", { "aria-current": "location" }, n.name)
      : make("button", { type: "button", on: { click: () => open(n.path) } }, n.name))));
  };

  const open = (path, back = null) => {
    state.path = path;
    drawCrumbs();
    drawMap();
    entryTable.reset();
    $("where").textContent = path ? `in ${path}` : "";
    const target = tiles.find((tile) => `${tile.dataset.path}.`.startsWith(`${back}.`)) || tiles[0];
    if (target) focus(target);
    say(`${path || root.name}: ${words(find(path))}`);
  };
  const up = () => {
    if (!state.path) return;
    let above = find(state.path).parent;
    while (above.parent && above.children.size === 1) above = above.parent;
    open(above.path, state.path);
  };

  const focus = (tile) => {
    for (const each of tiles) each.tabIndex = -1;
    tile.tabIndex = 0;
    tile.focus({ preventScroll: true });
  };
  const step = (from, dx, dy) => {
    const centre = (t) => [t.offsetLeft + t.offsetWidth / 2, t.offsetTop + t.offsetHeight / 2];
    const [x, y] = centre(from);
    let best = null, least = Infinity;
    for (const tile of tiles) {
      const [cx, cy] = centre(tile), ahead = (cx - x) * dx + (cy - y) * dy, aside = Math.abs((cx - x) * dy) + Math.abs((cy - y) * dx);
      if (tile !== from && ahead > 1 && ahead + 2 * aside < least) { least = ahead + 2 * aside; best = tile; }
    }
    // Nothing lies exactly that way: the next one in order, so that every area can be reached.
    return best || tiles[tiles.indexOf(from) + (dx + dy)] || from;
  };

  $("map").addEventListener("click", (event) => {
    const tile = event.target.closest(".tile");
    if (!tile) return;
    if (tile.dataset.path === state.path) { $("tensors").scrollIntoView(); $("tensors").focus({ preventScroll: true }); }
    else open(tile.dataset.path);
  });
  $("map").addEventListener("keydown", (event) => {
    const tile = event.target.closest(".tile");
    const arrows = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] };
    if (!tile) return;
    if (event.key in arrows) focus(step(tile, ...arrows[event.key]));
    else if (event.key === "Home") focus(tiles[0]);
    else if (event.key === "End") focus(tiles[tiles.length - 1]);
    else if (event.key === "Escape" || event.key === "Backspace") up();
    else return;
    event.preventDefault();
  });
  const tell = (event) => {
    const tile = event.target.closest(".tile");
    if (tile) $("detail").textContent = `${tile.node.path || root.name}: ${words(tile.node)}`;
  };
  $("map").addEventListener("mouseover", tell);
  $("map").addEventListener("focusin", tell);

  // ---- Tables ---------------------------------------------------------------------------------------------------
  // A long name breaks after its dots.
  const broken = (text) => text.split(/(?<=\.)/).flatMap((part, i) => (i ? [make("wbr"), part] : [part]));
  const marked = (text, needle) => {
    const at = needle ? text.toLowerCase().indexOf(needle) : -1;
    if (at < 0) return broken(text);
    const end = at + needle.length;
    return [...broken(text.slice(0, at)), make("mark", {}, text.slice(at, end)), ...broken(text.slice(end))];
  };
  const natural = new Intl.Collator("en", { numeric: true }).compare;

  // Pages of rows: what is in the document stays small, however many there are.
  const table = ({ place, label, length, columns, keep, needle, noun }) => {
    let rows = [], at = 0, sort = null, falling = false;
    const body = make("tbody"), counted = make("span", { class: "count" });
    const heads = columns.map((column) => make("th", { scope: "col", ...(column.number ? { class: "number" } : {}) },
      make("button", { type: "button", on: { click: () => order(column) } }, column.title)));
    const turn = (words, to) => make("button", { type: "button", on: { click: () => { at = to(); show(); } } }, words);
    const pages = () => Math.max(Math.ceil(rows.length / PAGE), 1);
    const first = turn("First", () => 0), back = turn("Previous", () => at - 1);
    const next = turn("Next", () => at + 1), last = turn("Last", () => pages() - 1);
    const wrap = make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label });
    const grid = make("table", { class: "grid" }, make("caption", { class: "visually-hidden" }, label),
      make("thead", {}, make("tr", {}, ...heads)), body);
    wrap.append(grid);
    place.append(wrap, make("nav", { class: "pager", "aria-label": `Pages of ${label}` }, counted, first, back, next, last));

    const show = () => {
      const word = needle();
      body.replaceChildren(...rows.slice(at * PAGE, (at + 1) * PAGE).map((i, k) => {
        const row = make("tr", { "aria-rowindex": String(at * PAGE + k + 2) });
        columns.forEach((column, c) => row.append(make(c ? "td" : "th",
          { class: column.class, ...(c ? {} : { scope: "row" }) }, ...column.cell(i, word))));
        return row;
      }));
      grid.setAttribute("aria-rowcount", String(rows.length + 1));
      const from = rows.length ? at * PAGE + 1 : 0, to = Math.min((at + 1) * PAGE, rows.length);
      const of = rows.length === length ? plural(length, noun) : `${plural(rows.length, noun)} of ${count(length)}`;
      counted.textContent = rows.length > PAGE ? `${count(from)} to ${count(to)} of ${of}` : of;
      first.disabled = back.disabled = at === 0;
      next.disabled = last.disabled = at >= pages() - 1;
      return of;
    };
    const fill = () => {
      rows = [];
      for (let i = 0; i < length; i++) if (keep(i)) rows.push(i);
      if (sort) rows.sort((a, b) => (falling ? -1 : 1) * sort.compare(a, b) || a - b);
    };
    const order = (column) => {
      falling = sort === column && !falling;
      sort = column;
      columns.forEach((each, c) => {
        if (each === column) heads[c].setAttribute("aria-sort", falling ? "descending" : "ascending");
        else heads[c].removeAttribute("aria-sort");
      });
      at = 0;
      fill();
      show();
      say(`Sorted by ${column.title}, ${falling ? "descending" : "ascending"}`);
    };
    const reset = () => { at = 0; fill(); return show(); };
    reset();
    return { reset };
  };

  const text = (values, i) => data.texts[values[i]];
  const by = (value) => (a, b) => natural(value(a), value(b));
  const keyCell = (i, word) => {
    const keys = keysOf(i);
    if (!keys.length) return [make("span", { class: "none" }, "none")];
    const from = data.several && text(entries.source, i) ? [make("span", { class: "none" }, ` of ${text(entries.source, i)}`)] : [];
    if (keys.length === 1) return [...marked(keys[0], word), ...from];
    return [...marked(keys[0], word), make("details", {}, make("summary", {}, `and ${plural(keys.length - 1, "more key")}`),
      ...keys.slice(1).map((key) => make("div", {}, ...marked(key, word)))), ...from];
  };
  const haystack = [];
  const matches = (i) => {
    haystack[i] ??= [entries.name[i], ...keysOf(i), text(entries.how, i), text(entries.source, i)].join("\n").toLowerCase();
    return haystack[i].includes(state.search);
  };
  const verified = { full: "\u2713 all", sample: "\u2713 sample", no: "no", "": "" };
  const inside = (i) => !state.path || entries.name[i] === state.path || entries.name[i].startsWith(`${state.path}.`);
  const entryTable = table({
    place: $("entries"), label: "tensors of the model", length: total, noun: "tensor", needle: () => state.search,
    keep: (i) => inside(i) && (!state.statuses.size || state.statuses.has(entries.status[i])) &&
      (!state.frozen || entries.frozen[i]) && (!state.search || matches(i)),
    columns: [
      { title: "Tensor", class: "name", cell: (i, word) => marked(entries.name[i], word), compare: by((i) => entries.name[i]) },
      { title: "Checkpoint key", class: "key", cell: keyCell, compare: by((i) => keysOf(i)[0] || "") },
      { title: "Shape", class: "fixed", cell: (i) => [data.shapes[entries.shape[i]][0]], compare: (a, b) => numel(a) - numel(b) },
      { title: "Dtype", class: "fixed", cell: (i) => [text(entries.dtype, i)], compare: by((i) => text(entries.dtype, i)) },
      { title: "Status", class: "status", compare: (a, b) => entries.status[a] - entries.status[b],
        cell: (i) => [make("span", { class: "chip" }, make("span", { class: `swatch ${slug(entries.status[i])}` }), data.statuses[entries.status[i]])] },
      { title: "By", class: "how", cell: (i, word) => marked(text(entries.how, i), word), compare: by((i) => text(entries.how, i)) },
      { title: "Verified", class: "fixed", cell: (i) => [verified[text(entries.verified, i)]], compare: by((i) => text(entries.verified, i)) },
      { title: "Frozen", class: "fixed", cell: (i) => [entries.frozen[i] ? "frozen" : ""], compare: (a, b) => entries.frozen[b] - entries.frozen[a] },
    ],
  });

  const unused = data.unused;
  if (unused.name.length) {
    let word = "";
    const own = table({
      place: $("keys"), label: "keys that are not used", length: unused.name.length, noun: "key", needle: () => word,
      keep: (i) => !word || unused.name[i].toLowerCase().includes(word) || text(unused.why, i).toLowerCase().includes(word),
      columns: [
        { title: "Key", class: "key", cell: (i, w) => marked(unused.name[i], w), compare: by((i) => unused.name[i]) },
        ...(data.several ? [{ title: "Source", class: "key", cell: (i) => [text(unused.source, i)], compare: by((i) => text(unused.source, i)) }] : []),
        { title: "Shape", class: "fixed", cell: (i) => [data.shapes[unused.shape[i]][0]], compare: (a, b) => data.shapes[unused.shape[a]][1] - data.shapes[unused.shape[b]][1] },
        { title: "Dtype", class: "fixed", cell: (i) => [text(unused.dtype, i)], compare: by((i) => text(unused.dtype, i)) },
        { title: "Why", class: "how", compare: by((i) => text(unused.why, i)),
          cell: (i, w) => [...(unused.error[i] ? [make("span", { class: "chip" }, make("span", { class: "swatch s-error" }), "error: ")] : []), ...marked(text(unused.why, i), w)] },
      ],
    });
    $("search-unused").addEventListener("input", (event) => { word = event.target.value.toLowerCase(); say(own.reset()); });
  }

  // ---- Filters --------------------------------------------------------------------------------------------------
  const press = (button, on) => button.setAttribute("aria-pressed", String(on));
  $("search").addEventListener("input", (event) => { state.search = event.target.value.toLowerCase(); say(entryTable.reset()); });
  for (const button of document.querySelectorAll("#legend button")) {
    button.addEventListener("click", () => {
      const status = data.statuses.indexOf(button.dataset.status);
      if (button.id === "only-frozen") state.frozen = !state.frozen;
      else if (!state.statuses.delete(status)) state.statuses.add(status);
      press(button, button.id === "only-frozen" ? state.frozen : state.statuses.has(status));
      drawMap();
      say(entryTable.reset());
    });
  }
  ["by-elements", "by-tensors"].forEach((id, size) => $(id).addEventListener("click", () => {
    state.size = size;
    press($("by-elements"), size === 0);
    press($("by-tensors"), size === 1);
    drawMap();
  }));

  for (const button of document.querySelectorAll(".copy")) {
    button.addEventListener("click", async () => {
      const code = button.previousElementSibling;
      getSelection().selectAllChildren(code);
      try { await navigator.clipboard.writeText(code.textContent); } catch { document.execCommand("copy"); }
      button.textContent = "Copied";
      say("Copied");
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    });
  }

  drawCrumbs();
  drawMap();
  new ResizeObserver(() => { if ($("map").clientWidth !== width) drawMap(); }).observe($("map"));
})();
