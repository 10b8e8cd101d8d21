"use strict";
// What all pages share: words, calls, the toast with its undo, and the buttons of lists that htmx loads.

const words = JSON.parse(document.getElementById("words").textContent);
const csrf = document.querySelector('meta[name="csrf"]').content;

function trouble(status, found) {  // what went wrong in the page's language, and what the server says of it
  if (status === 401) location.assign("/login");
  const told = words[`error_${status}`] || words.failed, why = found?.errors?.map((one) => `${one.problem} → ${one.remedy}`).join("; ");
  return new Error(why ? `${told} (${why})` : told);
}

async function ask(path, options) {  // a response that is a success
  let response;
  try {
    response = await fetch(path, { ...options, headers: { ...options.headers, "X-CSRF-Token": csrf } });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Error(words.offline);
  }
  if (!response.ok) throw trouble(response.status, await response.json().catch(() => null));
  return response;
}

async function call(method, path, body) {
  const response = await ask(path, { method, headers: { "Content-Type": "application/json" }, body: body === undefined ? undefined : JSON.stringify(body) });
  return response.json();
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
  box.querySelector("button")?.focus();  // whoever has no mouse is there at once
  clearTimeout(fading);
  fading = setTimeout(() => {
    if (box.contains(document.activeElement)) document.getElementById("main").focus();
    box.classList.remove("on");
  }, 10000);
}

async function attempt(deed) {
  try { await deed(); } catch (error) { toast(error.message); }
}

document.addEventListener("htmx:responseError", ({ detail: { xhr } }) => {
  let found = null;
  try { found = JSON.parse(xhr.responseText); } catch { /* no JSON, no details */ }
  toast(trouble(xhr.status, found).message);
});
document.addEventListener("htmx:sendError", () => toast(words.offline));

function changed(id) { htmx.trigger(document.getElementById(id), "changed"); }

async function reload(focused) {  // the list, as it is filtered now; `focused`: a memory's id
  const form = document.querySelector('form[role="search"]');
  await htmx.ajax("GET", "/page/memories?" + new URLSearchParams(new FormData(form)), "#rows");
  if (focused) document.querySelector(`#memory-${focused} button`)?.focus();
}

function edit(item, memory, opener) {
  if (item.querySelector("form")) return item.querySelector("form input").focus();
  const form = document.createElement("form"), input = document.createElement("input"), save = document.createElement("button"), cancel = document.createElement("button");
  form.className = "bar"; input.className = "wide"; input.value = memory.text; input.setAttribute("aria-label", words.text);
  save.textContent = words.save; cancel.textContent = words.cancel; cancel.type = "button"; cancel.className = "link";
  cancel.onclick = () => { form.remove(); opener.focus(); };
  form.onkeydown = (event) => { if (event.key === "Escape") cancel.onclick(); };
  form.onsubmit = (event) => { event.preventDefault(); attempt(async () => { await call("PATCH", `/api/memories/${memory.id}`, { text: input.value }); await reload(memory.id); }); };
  form.append(input, save, cancel); item.append(form); input.focus();
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  const item = button.closest("li[data-memory]"), memory = item && JSON.parse(item.dataset.memory);
  if (button.dataset.delete) attempt(async () => {
    await call("DELETE", `/api/memories/${memory.id}`);
    await reload();
    const { scope, subject, text, relation, sources, date } = memory;
    const restore = async () => { const back = await call("POST", "/api/memories", { scope, subject, text, relation, sources, date: date || null }); await reload(back.memory.id); };
    toast(`${words.deleted}: ${text}`, words.undo, memory.state === "active" && restore);  // what was superseded would come back as if it still held
  });
  else if (button.dataset.correct) edit(item, memory, button);
  else if (button.dataset.promote) attempt(async () => { await call("POST", `/api/releases/${button.dataset.promote}/promote`, {}); changed("releases"); });
});

document.addEventListener("submit", (event) => {
  if (event.target.id === "add") {
    event.preventDefault();
    attempt(async () => { await call("POST", "/api/memories", Object.fromEntries(new FormData(event.target))); event.target.reset(); await reload(); });
  } else if (event.target.id === "start") {
    event.preventDefault();
    attempt(async () => { await call("POST", "/api/training", { smoke: document.getElementById("smoke").checked }); changed("night"); });
  }
});
