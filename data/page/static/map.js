"use strict";
// Memories as points: the first two principal axes of their keys.

const svg = document.getElementById("map"), label = document.getElementById("point"), near = document.getElementById("neighbours"), scope = document.getElementById("map-scope"), query = document.getElementById("map-query");
const shape = (name, facts) => { const one = document.createElementNS("http://www.w3.org/2000/svg", name); for (const key in facts) one.setAttribute(key, facts[key]); return one; };
const hue = (text) => [...text].reduce((sum, letter) => (sum * 31 + letter.codePointAt(0)) % 360, 7);

async function draw() {
  const found = await call("GET", "/api/map?" + new URLSearchParams({ ...(scope.value && { scope: scope.value }), ...(query.value.trim() && { meaning: query.value.trim() }) }));
  svg.replaceChildren(); near.replaceChildren();
  const close = new Map(found.neighbours.map((one) => [one.id, one.score])), places = new Map(found.points.map((one) => [one.id, one]));
  if (found.query) for (const id of close.keys()) if (places.has(id)) svg.append(shape("line", { x1: found.query.x, y1: -found.query.y, x2: places.get(id).x, y2: -places.get(id).y }));
  for (const one of found.points) {
    const dot = shape("circle", { cx: one.x, cy: -one.y, r: close.has(one.id) ? 0.03 : 0.02, fill: `hsl(${hue(one.subject)} 60% 50%)`, tabindex: 0, class: close.has(one.id) ? "near" : "" });
    const title = shape("title", {}); title.textContent = one.text; dot.append(title);
    const show = () => { label.textContent = `#${one.id} ${one.text} · ${one.scope}`; };
    dot.addEventListener("mouseenter", show); dot.addEventListener("focus", show);
    svg.append(dot);
  }
  if (found.query) svg.append(shape("path", { d: `M ${found.query.x} ${-found.query.y - 0.05} l .04 .05 l -.04 .05 l -.04 -.05 z` }));
  for (const one of found.neighbours) { const row = document.createElement("li"); row.textContent = `${one.text} (${one.score.toFixed(2)})`; near.append(row); }
}

document.getElementById("locate").addEventListener("submit", (event) => { event.preventDefault(); attempt(draw); });
scope.addEventListener("change", () => attempt(draw));
attempt(draw);
