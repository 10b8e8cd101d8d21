"use strict";
// Memories as points: the first two principal axes of their keys.

const svg = document.getElementById("map"), legend = document.getElementById("legend"), label = document.getElementById("point"), near = document.getElementById("neighbours"), scope = document.getElementById("map-scope"), query = document.getElementById("map-query");
const shape = (name, facts) => { const one = document.createElementNS("http://www.w3.org/2000/svg", name); for (const key in facts) one.setAttribute(key, facts[key]); return one; };
const LABELS = 24, PEOPLE = 12;  // more of them would hide each other
const colour = (place) => `hsl(${Math.round(place * 137.508) % 360} 65% ${[48, 62, 36][place % 3]}%)`;  // golden angle: neighbours in the list differ most

let newest = 0;  // answers may come in another order than they were asked for

async function draw() {
  const mine = ++newest, found = await call("GET", "/api/map?" + new URLSearchParams({ ...(scope.value && { scope: scope.value }), ...(query.value.trim() && { meaning: query.value.trim() }) }));
  if (mine !== newest) return;
  svg.replaceChildren(); near.replaceChildren(); legend.replaceChildren();
  label.textContent = found.points.length ? "\u00a0" : words.none;
  const close = new Map(found.neighbours.map((one) => [one.id, one.score])), places = new Map(found.points.map((one) => [one.id, one]));
  if (found.query) for (const id of close.keys()) if (places.has(id)) svg.append(shape("line", { x1: found.query.x, y1: -found.query.y, x2: places.get(id).x, y2: -places.get(id).y }));
  const people = [...new Set(found.points.map((one) => one.subject))], colours = new Map(people.map((who, place) => [who, colour(place)])), names = [];
  for (const one of found.points) {
    const dot = shape("circle", { cx: one.x, cy: -one.y, r: close.has(one.id) ? 0.03 : 0.02, fill: colours.get(one.subject), tabindex: 0, role: "img", "aria-label": one.text, class: close.has(one.id) ? "near" : "" });
    const title = shape("title", {}); title.textContent = one.text; dot.append(title);
    const show = () => { label.textContent = `#${one.id} ${one.text} · ${one.scope}`; };
    dot.addEventListener("mouseenter", show); dot.addEventListener("focus", show);
    svg.append(dot);
    if (close.has(one.id) || found.points.length <= LABELS) {
      const name = shape("text", { x: one.x + (one.x > 0.4 ? -0.04 : 0.04), y: -one.y + 0.02, "text-anchor": one.x > 0.4 ? "end" : "start" });
      name.textContent = one.text; names.push(name);
    }
  }
  for (const who of people.slice(0, PEOPLE)) {
    const mark = document.createElement("i"), entry = document.createElement("span");
    mark.style.background = colours.get(who);
    entry.append(mark, who); legend.append(entry);
  }
  if (people.length > PEOPLE) legend.append(`+${people.length - PEOPLE} ${words.others}`);
  if (found.query) svg.append(shape("path", { d: `M ${found.query.x} ${-found.query.y - 0.05} l .04 .05 l -.04 .05 l -.04 -.05 z` }));
  svg.append(...names);  // over the points
  for (const one of found.neighbours) { const row = document.createElement("li"); row.textContent = `${one.text} (${one.score.toFixed(2)})`; near.append(row); }
}

document.getElementById("locate").addEventListener("submit", (event) => { event.preventDefault(); attempt(draw); });
scope.addEventListener("change", () => attempt(draw));
attempt(draw);
