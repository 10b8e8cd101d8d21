// The menu of narrow screens, and the search. SECTIONS comes from search.js, loaded when somebody first searches.
const box = document.getElementById("search"), found = document.getElementById("found"), menu = document.getElementById("menu");

menu.addEventListener("click", () => menu.setAttribute("aria-expanded", document.body.classList.toggle("menu")));
document.querySelector("#contents [aria-current]")?.scrollIntoView({ block: "center" });

let loading;
function load() {
  return loading ??= new Promise((done, failed) => {
    const script = Object.assign(document.createElement("script"), { src: "search.js", onload: done, onerror: failed });
    document.head.append(script);
  });
}

// All words must occur. A name or heading that is the query comes first, then those that begin with it or hold it, then texts by how often they hold its words.
function rank(section, words, query) {
  const head = section.heading.toLowerCase(), text = section.text.toLowerCase();
  if (!words.every(word => head.includes(word) || text.includes(word))) return 0;
  const often = words.reduce((sum, word) => sum + text.split(word).length - 1, 0);
  const titled = head === query ? 3000 : head.startsWith(query) ? 2000 : words.every(word => head.includes(word)) ? 1000 : 0;
  return 1 + titled + (titled && section.name ? 500 : 0) + Math.min(often, 99);
}

function marked(text, words) { // a piece around the first word, with the words marked
  const lower = text.toLowerCase(), first = Math.min(...words.map(word => lower.indexOf(word)).filter(at => at >= 0), Infinity);
  const from = first === Infinity ? 0 : Math.max(0, first - 40), piece = document.createElement("small");
  let rest = (from ? "…" : "") + text.slice(from, from + 140);
  while (rest) {
    const low = rest.toLowerCase(), hits = words.map(word => [low.indexOf(word), word.length]).filter(hit => hit[0] >= 0).sort((a, b) => a[0] - b[0]);
    if (!hits.length) break;
    const [at, size] = hits[0], mark = document.createElement("mark");
    mark.textContent = rest.slice(at, at + size);
    piece.append(rest.slice(0, at), mark);
    rest = rest.slice(at + size);
  }
  piece.append(rest);
  return piece;
}

function show() {
  const query = box.value.trim().toLowerCase(), words = query.split(/\s+/).filter(Boolean);
  found.replaceChildren();
  found.hidden = !words.length;
  if (!words.length) return;
  const best = SECTIONS.map(section => [rank(section, words, query), section]).filter(pair => pair[0]).sort((a, b) => b[0] - a[0]).slice(0, 30);
  for (const [, section] of best) {
    const item = document.createElement("li"), link = document.createElement("a");
    link.href = section.url;
    link.append(section.heading === section.page ? section.heading : `${section.heading} · ${section.page}`, marked(section.text, words));
    item.append(link);
    found.append(item);
  }
  if (!best.length) found.append(Object.assign(document.createElement("li"), { textContent: "nothing found" }));
}

box.addEventListener("focus", load);
box.addEventListener("input", () => load().then(show, () => { found.hidden = false; found.textContent = "search.js could not be loaded"; }));
box.addEventListener("keydown", event => {
  if (event.key === "Enter") found.querySelector("a")?.click();
  if (event.key === "Escape") { box.value = ""; found.hidden = true; }
  if (event.key === "ArrowDown") { event.preventDefault(); found.querySelector("a")?.focus(); }
});
found.addEventListener("keydown", event => {
  const step = { ArrowDown: "nextElementSibling", ArrowUp: "previousElementSibling" }[event.key];
  if (step) { event.preventDefault(); (document.activeElement.closest("li")[step]?.querySelector("a") ?? box).focus(); }
});
found.addEventListener("click", () => { found.hidden = true; });
document.addEventListener("keydown", event => {
  if (event.key === "/" && document.activeElement !== box) { event.preventDefault(); box.focus(); }
});
document.addEventListener("click", event => { if (!event.target.closest(".search")) found.hidden = true; });
