"use strict";
// What all pages share: words, calls, the toast with its undo, and the buttons of lists that htmx loads.

const words = JSON.parse(document.getElementById("words").textContent);
const csrf = document.querySelector('meta[name="csrf"]').content;

async function call(method, path, body) {
  const response = await fetch(path, {
    method,
    headers: { "Content-Type": "application/json", "X-CSRF-Token": csrf },
    body: body === undefined ? undefined : JSON.stringify(body),
  });
  const found = await response.json();
  if (!response.ok) throw new Error(found.errors.map((one) => `${one.problem} → ${one.remedy}`).join("; "));
  return found;
}

let fading;
function toast(text, label, deed) {
  const box = document.getElementById("toast");
  box.textContent = text + " ";
  if (deed) {
    const button = document.createElement("button");
    button.textContent = label;
    button.onclick = () => { box.classList.remove("on"); attempt(deed); };
    box.append(button);
  }
  box.classList.add("on");
  clearTimeout(fading);
  fading = setTimeout(() => box.classList.remove("on"), 10000);
}

async function attempt(deed) {
  try { await deed(); } catch (error) { toast(`${words.failed}: ${error.message}`); }
}

function changed(id) { htmx.trigger(document.getElementById(id), "changed"); }

function reload() {  // the list, as it is filtered now
  const form = document.querySelector('form[role="search"]');
  htmx.ajax("GET", "/page/memories?" + new URLSearchParams(new FormData(form)), "#rows");
}

function edit(item, memory) {
  const form = document.createElement("form"), input = document.createElement("input"), save = document.createElement("button"), cancel = document.createElement("button");
  form.className = "bar"; input.className = "wide"; input.value = memory.text; input.setAttribute("aria-label", words.text);
  save.textContent = words.save; cancel.textContent = words.cancel; cancel.type = "button"; cancel.className = "link";
  cancel.onclick = () => form.remove();
  form.onsubmit = (event) => { event.preventDefault(); attempt(async () => { await call("PATCH", `/api/memories/${memory.id}`, { text: input.value }); reload(); }); };
  form.append(input, save, cancel); item.append(form); input.focus();
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  const item = button.closest("li[data-memory]"), memory = item && JSON.parse(item.dataset.memory);
  if (button.dataset.delete) attempt(async () => {
    await call("DELETE", `/api/memories/${memory.id}`);
    reload();
    const { scope, subject, text, relation, sources, date } = memory;
    const restore = async () => { await call("POST", "/api/memories", { scope, subject, text, relation, sources, date: date || null }); reload(); };
    toast(`${words.deleted}: ${text}`, words.undo, memory.state === "active" && restore);  // what was superseded would come back as if it still held
  });
  else if (button.dataset.correct) edit(item, memory);
  else if (button.dataset.promote) attempt(async () => { await call("POST", `/api/releases/${button.dataset.promote}/promote`, {}); changed("releases"); });
});

document.addEventListener("submit", (event) => {
  if (event.target.id === "add") {
    event.preventDefault();
    attempt(async () => { await call("POST", "/api/memories", Object.fromEntries(new FormData(event.target))); event.target.reset(); reload(); });
  } else if (event.target.id === "start") {
    event.preventDefault();
    attempt(async () => { await call("POST", "/api/training", { smoke: document.getElementById("smoke").checked }); changed("night"); });
  }
});
