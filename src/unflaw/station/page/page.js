// Page of the station. It uses the public HTTP API only.

const $ = (id) => document.getElementById(id);
const WORDS = { good: "Good", defect: "Defect", review: "Review", busy: "Inspecting …", error: "Not inspected" };
const SIGNS = { good: "✓", defect: "✕", review: "?", busy: "…", error: "!" };
const PATHS = {
  good: "M10 25l10 10L38 13",
  defect: "M13 13l22 22M35 13L13 35",
  review: "M17 18a7 7 0 1 1 10.5 6C25 26 24 27 24 30M24 37v.5",
  busy: "M24 12v12l7 6",
  error: "M24 5a19 19 0 1 0 0 38a19 19 0 0 0 0-38M24 15v11M24 33v.5",
};
const LEGENDS = { heat: ["good", "far above the threshold"], uncertainty: ["low", "high"] };
const BLENDS = { heat: 50, restored: 100 }; // initial values
const ENOUGH = 8; // images drawn at random from which on only these are used for calibration
const LAYERS = { image: "Image", heat: "Heat map", mean: "Mean", uncertainty: "Uncertainty", mask: "Mask", restored: "Restored" };

const stored = (name, fallback) => localStorage.getItem(`unflaw.${name}`) ?? fallback;
const store = (name, value) => localStorage.setItem(`unflaw.${name}`, value);

const state = {
  view: "inspect",
  lists: { inspect: [], review: [], history: [] }, // lists for ← and →, of items {name, entry, verdict, error}
  index: { inspect: -1, review: -1, history: -1 },
  station: null,
  layer: stored("layer", "heat"),
  images: [],
  contours: [],
  chosen: null, // index of the selected region
  next: null, // next page of the history
  open: false, // history shows one inspection instead of the list
};

// Creates an element. Text never becomes markup.
function el(tag, attributes = {}, ...children) {
  const element = /^(svg|path|polygon|rect|g)$/.test(tag)
    ? document.createElementNS("http://www.w3.org/2000/svg", tag)
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child != null));
  return element;
}

const number = (value, digits = 4) => Number(value.toPrecision(digits)).toString().replace("-", "−");
const percent = (share) => `${number(share * 100, 2)} %`;
const moment = (time) => new Date(time).toLocaleString([], { dateStyle: "short", timeStyle: "medium" });
const counted = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;
const bytes = (count) => (count < 1e6 ? `${Math.ceil(count / 1e3)} kB` : `${number(count / 1e6, 3)} MB`);

// Requests

class Problem extends Error {
  constructor(message, status, wait = 1) {
    super(message);
    Object.assign(this, { status, wait });
  }
}

const TOKEN = `unflaw.token${location.pathname}`; // of this station: others may be published under other paths of the host
let token = sessionStorage.getItem(TOKEN);
let login = null;

// Sends a request. Paths are relative to the page: a proxy may publish the station under any path.
async function request(path, options = {}) {
  const used = token;
  const headers = new Headers(options.headers);
  if (used) headers.set("Authorization", `Bearer ${used}`);
  let answer;
  try {
    answer = await fetch(path, { ...options, headers });
  } catch {
    answer = null;
  }
  if (!answer || answer.status === 502 || answer.status === 504) { // from a proxy without its station
    lost();
    throw new Problem("The station does not answer.", 0);
  }
  if (answer.status === 401) {
    if (token === used) await needToken(Boolean(used));
    return request(path, options);
  }
  if (answer.ok) return answer;
  const { detail } = await answer.json().catch(() => ({}));
  throw new Problem(detail ?? `The station answered ${answer.status}.`, answer.status, Number(answer.headers.get("retry-after")) || 1);
}

const json = async (path, options) => (await request(path, options)).json();
const send = (path, method, body) => json(path, { method, body: JSON.stringify(body), headers: { "Content-Type": "application/json" } });

function needToken(wrong) {
  login ??= new Promise((resolve) => {
    $("wrong").hidden = !wrong;
    $("login").addEventListener("close", () => {
      token = $("token").value.trim();
      $("token").value = "";
      sessionStorage.setItem(TOKEN, token);
      login = null;
      resolve();
    }, { once: true });
    $("login").showModal();
  });
  return login;
}
$("login").addEventListener("cancel", (event) => event.preventDefault()); // nothing works without the token

let away = null;
function lost() {
  $("lost").hidden = false;
  away ??= setInterval(async () => {
    if (!(await fetch("health").then((answer) => answer.ok, () => false))) return;
    clearInterval(away);
    away = null;
    $("lost").hidden = true;
    withNotice(refresh)();
  }, 2000);
}

function notice(text, wrong = false) {
  const box = el("div", { class: wrong ? "notice wrong" : "notice" }, el("span", {}, text));
  box.append(el("button", { type: "button", class: "icon", "aria-label": "Dismiss", onclick: () => box.remove() }, "×"));
  $("notices").append(box);
  if (!wrong) setTimeout(() => box.remove(), 6000);
  while ($("notices").children.length > 4) $("notices").firstChild.remove();
}

// Wraps a function so that its errors are shown.
const withNotice = (work) => async (...args) => {
  try {
    return await work(...args);
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    if (error.status !== 0) notice(error.message, true);
  }
};

// State of the station

async function refresh() {
  state.station = await json("station");
  $("waiting").hidden = !state.station.waiting;
  $("waiting").textContent = state.station.waiting;
  const names = state.station.detectors.map((detector) => detector.name);
  options($("detector"), names);
  options($("filter-detector"), names, ["All"]);
  $("detector").disabled = names.length < 2;
  categories();
  if (state.view === "detectors") showDetectors();
}

function options(select, names, first = []) {
  if (select.options.length === names.length + first.length) return;
  const values = [...first.map((text) => el("option", { value: "" }, text)), ...names.map((name) => el("option", { value: name }, name))];
  select.replaceChildren(...values);
}

const served = (name) => state.station?.detectors.find((detector) => detector.name === name);

function categories() {
  const names = Object.keys(served($("detector").value)?.categories ?? {});
  const several = names.length > 1 || (names.length === 1 && names[0] !== "");
  $("category").hidden = !several;
  if ([...$("category").options].map((option) => option.value).join("\n") !== names.join("\n")) {
    $("category").replaceChildren(...names.map((name) => el("option", { value: name }, name)));
  }
}

// Inspecting

const queue = [];
let sending = 0;

function inspect(files) {
  for (const file of files) {
    const item = { name: file.name || "image", verdict: "busy", file, detector: $("detector").value, category: $("category").value };
    state.lists.inspect.push(item);
    queue.push(item);
  }
  if (!files.length) return;
  if (state.view !== "inspect") show("inspect");
  select("inspect", state.lists.inspect.length - files.length);
  sendQueued();
}

function sendQueued() {
  while (queue.length && sending < 2) {
    sending += 1;
    const item = queue.shift();
    upload(item).catch((error) => {
      if (!(error instanceof Problem)) throw error;
      Object.assign(item, { verdict: "error", error: error.message });
    }).finally(() => {
      sending -= 1;
      delete item.file;
      changed(item);
      sendQueued();
    });
  }
}

async function upload(item) {
  const limit = state.station?.max_bytes;
  if (limit && item.file.size > limit) {
    throw new Problem(`${item.name} has ${bytes(item.file.size)}; this station takes ${bytes(limit)}. Send a smaller image.`, 413);
  }
  const query = new URLSearchParams({ name: item.name.slice(-200), detector: item.detector, category: item.category });
  const headers = { "Content-Type": item.file.type || "application/octet-stream" };
  item.entry = await retry(() => json(`inspect?${query}`, { method: "POST", body: item.file, headers }), (waits) => {
    item.waits = waits;
    if (waits) changed(item);
  });
  item.verdict = item.entry.verdict;
  if (item.verdict !== "good" || item.entry.sampled) withNotice(refresh)();
}

function changed(item) {
  if (current() === item) display();
  else strip();
}

// Selection of the image

const list = () => state.lists[state.view] ?? [];
const current = () => list()[state.index[state.view]];

function select(view, index) {
  state.index[view] = Math.max(-1, Math.min(index, state.lists[view].length - 1));
  state.chosen = null;
  display();
}

const asItem = (entry) => ({ name: entry.name, verdict: entry.verdict, entry });

function show(view) {
  state.view = view;
  state.open = false;
  for (const button of document.querySelectorAll("nav button")) {
    if (button.dataset.view === view) button.setAttribute("aria-current", "page");
    else button.removeAttribute("aria-current");
  }
  display();
  if (view === "review") withNotice(loadReview)();
  if (view === "history") withNotice(loadHistory)();
  withNotice(refresh)();
}

async function loadReview() {
  const found = await json("inspections?waiting=true&limit=200");
  state.lists.review = found.items.map(asItem);
  if (state.view === "review") select("review", 0);
}

function display() {
  const item = current();
  const detail = state.view === "history" ? state.open : item;
  $("empty").hidden = state.view !== "inspect" || Boolean(item);
  $("idle").hidden = state.view !== "review" || Boolean(item);
  $("history").hidden = state.view !== "history" || state.open;
  $("detectors").hidden = state.view !== "detectors";
  $("viewer").hidden = !detail;
  for (const part of document.querySelectorAll("[data-for]")) part.hidden = part.dataset.for !== state.view;
  strip();
  if (!detail || !item) return;
  $("position").textContent = `${state.index[state.view] + 1} of ${list().length}`;
  showVerdict(item);
  showDetails(item);
  withNotice(showImages)(item);
}

function showVerdict(item) {
  const detail = item.waits ? "The station is busy; waiting" : item.error ?? item.name;
  const key = [item.verdict, detail].join("\n");
  if ($("verdict").dataset.key === key && $("verdict").dataset.id === String(item.entry?.id)) return; // no repeated announcement
  Object.assign($("verdict").dataset, { key, id: item.entry?.id });
  $("verdict").className = item.verdict;
  const sign = el("svg", { viewBox: "0 0 48 48", "aria-hidden": "true" }, el("path", { d: PATHS[item.verdict] }));
  $("verdict").replaceChildren(sign, el("div", {}, WORDS[item.verdict], el("small", {}, detail)));
}

function showDetails(item) {
  const entry = item.entry;
  for (const part of [".details", ".controls"]) document.querySelector(part).hidden = !entry;
  if (!entry) return;
  const share = entry.p_value < 1 ? `About ${percent(entry.p_value)} of good parts score this high.` : "Every good part scores this high.";
  const estimate = entry.p_estimated == null ? "" : ` Estimated: ${percent(entry.p_estimated)}.`;
  $("measure").textContent = `Score ${number(entry.score)}, threshold ${number(entry.threshold)}. ${share}${estimate}`;
  $("decided").textContent = entry.decision ? `${WORDS[entry.decision]}, decided by ${entry.decided_by}, ${moment(entry.decided_at)}` : "No decision yet.";
  for (const button of document.querySelectorAll(".decide button")) {
    if (button.id === "undo") button.disabled = !entry.decision;
    else button.setAttribute("aria-pressed", String(button.dataset.act === entry.decision));
  }
  const regions = entry.regions.map((region, i) => {
    const uncertainty = region.uncertainty == null ? "" : ` · uncertainty ${number(region.uncertainty, 2)}`;
    const text = `peak ${number(region.peak, 3)} · ${number(region.area, 3)} px${uncertainty}`;
    return el("li", {}, el("button", { type: "button", "aria-pressed": String(state.chosen === i), onclick: () => point(i) }, el("span", {}, `Region ${i + 1}`), el("small", {}, text)));
  });
  $("regions").replaceChildren(...(regions.length ? regions : [el("li", { class: "dim" }, "None above the threshold.")]));
  const facts = {
    Time: moment(entry.time),
    Detector: entry.category ? `${entry.detector}, ${entry.category}` : entry.detector,
    Image: `${entry.width} × ${entry.height}, ${bytes(entry.size)}`,
    Number: entry.id,
    Digest: entry.digest.slice(0, 16),
    ...(entry.sampled ? { Review: "drawn at random" } : {}),
    ...(entry.source ? { Watched: entry.source } : {}),
  };
  $("facts").replaceChildren(...Object.entries(facts).flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, String(value))]));
}

function point(i) {
  state.chosen = state.chosen === i ? null : i;
  showDetails(current());
  outline(current().entry);
}

function strip() {
  if (state.view !== "inspect") return;
  const here = $("strip").contains(document.activeElement);
  $("strip").replaceChildren(...state.lists.inspect.map((item, i) => el(
    "button",
    { type: "button", "aria-current": i === state.index.inspect ? "true" : null, title: item.error ?? item.name, onclick: () => select("inspect", i) },
    el("span", { class: `mark ${item.verdict}`, "aria-label": WORDS[item.verdict] }, SIGNS[item.verdict]),
    el("span", {}, item.name),
  )));
  const button = $("strip").children[state.index.inspect];
  if (!button) return;
  if (here) button.focus({ preventScroll: true });
  $("strip").scrollLeft = button.offsetLeft - ($("strip").clientWidth - button.clientWidth) / 2; // scrollIntoView would also scroll the page
}

// Images: fetched with the token instead of by `src`

const shown = { id: null, ready: false, urls: new Map() };

async function showImages(item) {
  const entry = item.entry;
  if (shown.id !== entry?.id || !entry) {
    for (const url of shown.urls.values()) url.then(URL.revokeObjectURL, () => {});
    Object.assign(shown, { id: entry?.id ?? null, ready: false, urls: new Map() });
    for (const image of [$("base"), $("over"), $("full")]) {
      image.removeAttribute("src");
      image.hidden = image.id !== "base";
    }
    $("legend").hidden = true;
    $("main").scrollTo(0, 0);
    $("stage").hidden = !entry;
    $("unseen").hidden = true;
    if (!entry) return;
    $("stage").style.setProperty("--ratio", entry.width / entry.height);
    $("base").alt = `${WORDS[entry.verdict]}: ${entry.name}`;
    outline(entry);
    try {
      const found = await retry(() => json(`inspections/${entry.id}/images`));
      if (shown.id !== entry.id) return;
      Object.assign(state, found);
      shown.ready = true;
    } catch (error) {
      if (!(error instanceof Problem) || shown.id !== entry.id) throw error;
      $("stage").hidden = true;
      $("unseen").hidden = false;
      $("unseen").textContent = error.message;
      return;
    }
    layers();
    outline(entry);
  }
  if (!entry || !shown.ready) return;
  const layer = state.images.includes(state.layer) ? state.layer : "image";
  // the heat map in two steps: high values over the image, then the whole map
  const wanted = { image: ["image"], heat: ["image", "overlay", "heat"] }[layer] ?? ["image", layer];
  const [base, over, full] = await Promise.all(wanted.map((name) => image(entry.id, name)));
  if (shown.id !== entry.id || current() !== item) return;
  for (const [image, url] of [[$("base"), base], [$("over"), over], [$("full"), full]]) {
    image.hidden = !url;
    if (url && image.src !== url) image.src = url;
  }
  $("legend").hidden = !LEGENDS[layer];
  $("legend").className = layer;
  $("legend").firstChild.textContent = LEGENDS[layer]?.[0];
  $("legend").lastChild.textContent = LEGENDS[layer]?.[1];
  blend();
}

function image(id, name) {
  if (!shown.urls.has(name)) {
    const fetched = retry(() => request(`inspections/${id}/images/${name}`)).then((answer) => answer.blob()).then(URL.createObjectURL);
    fetched.catch(() => shown.urls.delete(name));
    shown.urls.set(name, fetched);
  }
  return shown.urls.get(name);
}

// Repeats a request while the station is busy.
async function retry(work, waiting = () => {}) {
  for (let attempt = 0; ; attempt += 1) {
    try {
      return await work();
    } catch (error) {
      if (error.status !== 429 || attempt >= 9) throw error;
      waiting(true);
      await new Promise((resolve) => setTimeout(resolve, error.wait * 1000));
      waiting(false);
    }
  }
}

function layers() {
  const legend = $("layers").firstElementChild;
  const names = state.images.filter((name) => !["overlay", "mean", "mask"].includes(name));
  const chosen = names.includes(state.layer) ? state.layer : "image";
  $("layers").hidden = !names.length;
  $("layers").replaceChildren(legend, ...names.map((name) => el(
    "label", {},
    el("input", { type: "radio", name: "layer", value: name, checked: name === chosen, onchange: () => layer(name) }),
    el("span", {}, LAYERS[name] ?? name),
  )));
  slider(chosen);
}

function slider(name) {
  $("blend").disabled = name === "image";
  $("blend").value = stored(`blend.${name}`, BLENDS[name] ?? 60);
}

function layer(name) {
  state.layer = name;
  store("layer", name);
  for (const input of $("layers").querySelectorAll("input")) input.checked = input.value === name;
  slider(name);
  withNotice(showImages)(current());
}

function blend() {
  const share = $("blend").value / 100;
  const steps = $("full").hidden ? 1 : 2;
  $("over").style.opacity = Math.min(1, steps * share);
  $("full").style.opacity = Math.max(0, steps * share - 1);
}

function slide() {
  const chosen = $("layers").querySelector("input:checked");
  if (chosen) store(`blend.${chosen.value}`, $("blend").value);
  blend();
}

function outline(entry) {
  const contours = shown.id === entry.id && shown.ready && state.contours.length === entry.regions.length ? state.contours : [];
  $("outlines").setAttribute("viewBox", `0 0 ${entry.width} ${entry.height}`);
  $("outlines").replaceChildren(...($("outlined").checked ? entry.regions : []).map((region, i) => {
    const [x0, y0, x1, y1] = region.box;
    const corners = contours[i]?.length ? contours[i] : [[x0, y0], [x1, y0], [x1, y1], [x0, y1]];
    const line = (kind) => el("polygon", { class: kind, points: corners.map((at) => at.join(",")).join(" ") });
    return el("g", { class: state.chosen === i ? "chosen" : "" }, line("halo"), line("edge"));
  }));
}

// Decisions

async function decide(decision) {
  const item = current();
  if (!item?.entry || $("viewer").hidden) return;
  const by = $("reviewer").value.trim();
  if (!by) {
    notice("Enter your name before you decide.", true);
    $("reviewer").focus();
    return;
  }
  store("reviewer", by);
  $("notices").replaceChildren();
  const view = state.view;
  item.entry = await send(`inspections/${item.entry.id}/review`, "PUT", { decision, by });
  if (view === "review" && state.view === view && decision && current() === item) {
    const after = list().findIndex((other, i) => i > state.index.review && !other.entry.decision);
    const next = after >= 0 ? after : list().findIndex((other) => !other.entry.decision);
    if (next >= 0) select("review", next);
    else await loadReview();
  } else if (current() === item) showDetails(item);
  await refresh();
}

// History

function filters() {
  const query = new URLSearchParams({ limit: "50" });
  for (const [name, value] of new FormData($("filters"))) {
    if (value) query.set(name, name === "since" || name === "until" ? new Date(value).toISOString() : value);
  }
  return query;
}

let requests = 0;
async function loadHistory(more = false) {
  const mine = ++requests;
  const query = filters();
  if (more) query.set("before", state.next);
  const found = await json(`inspections?${query}`);
  if (mine !== requests) return; // the filters have changed meanwhile
  const before = more ? state.lists.history : [];
  state.lists.history = [...before, ...found.items.map(asItem)];
  state.next = found.next;
  $("more").hidden = found.next === null;
  $("none").hidden = state.lists.history.length > 0;
  showRows();
}

function showRows() {
  $("rows").replaceChildren(...state.lists.history.map((item, i) => {
    const entry = item.entry;
    const open = () => {
      state.open = true;
      select("history", i);
    };
    return el(
      "tr", {},
      el("td", {}, el("span", { class: `mark ${entry.verdict}`, "aria-hidden": "true" }, `${SIGNS[entry.verdict]} `), WORDS[entry.verdict]),
      el("td", { class: "name" }, el("button", { type: "button", onclick: open }, entry.name)),
      el("td", {}, moment(entry.time)),
      el("td", {}, entry.category ? `${entry.detector}, ${entry.category}` : entry.detector),
      el("td", { class: "number" }, number(entry.score)),
      el("td", { class: "number" }, number(entry.p_value, 2)),
      el("td", {}, entry.decision ? `${WORDS[entry.decision]}, ${entry.decided_by}` : "–"),
    );
  }));
}

// Detectors and their calibration

const cards = new Map(); // created once, so that an update does not reset a form

function showDetectors() {
  for (const detector of state.station.detectors) {
    for (const [category, known] of Object.entries(detector.categories)) {
      const title = category ? `${detector.name}, ${category}` : detector.name;
      if (!cards.has(title)) cards.set(title, card(title, detector.name, category));
      cards.get(title)(detector, known);
    }
  }
}

// Creates the card of a detector; returns a function that updates it.
function card(title, name, category) {
  const [threshold, described, facts, why] = ["big", "", "dim", "dim"].map((kind) => el("p", { class: kind }));
  const field = (type, key, text, more = {}) => el("label", { class: "check" }, el("input", { type, name: key, ...more }), el("span", {}, text));
  const form = el(
    "form", {},
    field("checkbox", "append", "Also use the scores of the previous calibration", { checked: true }),
    field("checkbox", "sampled", "Use only good images drawn at random"),
    el("p", { class: "dim" }, "Good images that were reviewed because of their verdict are not representative: they raise the threshold."),
    field("number", "miss", "Maximum % of missed defects; empty: calibrate with good images only", { min: "0.1", max: "50", step: "any", inputmode: "decimal" }),
    el("div", { class: "row" }, el("button", { class: "primary" }, "Recalibrate")),
  );
  const { append, sampled, miss } = form.elements;
  const outcome = el("div", { role: "status", "aria-live": "polite" });
  let chosen = false;
  sampled.addEventListener("change", () => (chosen = true));
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const button = form.querySelector("button");
    button.disabled = true;
    outcome.replaceChildren(el("p", { class: "dim" }, "Inspecting the decided images …"));
    try {
      const wanted = { category, append: append.checked, sampled: sampled.checked, ...(miss.value ? { miss_rate: Number(miss.value) / 100 } : {}) };
      const done = await send(`detectors/${encodeURIComponent(name)}/calibrate`, "POST", wanted);
      const left = [done.seen && `${done.seen} used in training`, done.counted && `${done.counted} used before`, done.lost && `${done.lost} no longer kept`].filter(Boolean);
      const used = `with ${counted(done.good, "good image")} and ${counted(done.defects, "defective image")}${left.length ? ` (left out: ${left.join(", ")})` : ""}`;
      outcome.replaceChildren(el("p", { class: "done" }, `Threshold ${number(done.before.threshold)} → ${number(done.after.threshold)}, ${used}. Saved.`));
      await refresh();
    } catch (error) {
      if (!(error instanceof Problem)) throw error;
      outcome.replaceChildren(el("p", { class: "wrong" }, error.message));
    } finally {
      button.disabled = false;
    }
  });
  $("detectors").append(el("article", { class: "card", "aria-label": title }, el("h2", {}, title), el("div", {}, el("div", { class: "dim" }, "Threshold"), threshold), described, facts, why, form, outcome));
  return (detector, known) => {
    threshold.textContent = number(known.threshold);
    described.textContent = `${known.described[0].toUpperCase()}${known.described.slice(1)}.`;
    facts.textContent = `File ${detector.digest.slice(0, 16)}. Decisions: ${known.decided_good} good, of which ${known.decided_good_sampled} drawn at random, and ${counted(known.decided_defect, "defect")}.`;
    const reason = detector.fixed ?? (state.station.keeps_images ? null : "it needs images, and this station keeps none");
    why.textContent = reason ? `Recalibration is not possible: ${reason}.` : "";
    why.hidden = !reason;
    form.hidden = Boolean(reason);
    if (!chosen) sampled.checked = known.decided_good_sampled >= ENOUGH;
  };
}

// The camera

let stream = null;

async function camera() {
  if (!navigator.mediaDevices?.getUserMedia) return $("snap").click(); // without https: the camera application
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment", width: { ideal: 1920 }, height: { ideal: 1080 } } });
  } catch (error) {
    notice(error.name === "NotFoundError" ? "This device has no camera." : "Camera access was denied. Allow it in the browser.", true);
    return;
  }
  $("video").srcObject = stream;
  $("camera").showModal();
}

$("camera").addEventListener("close", () => {
  for (const track of stream?.getTracks() ?? []) track.stop();
  $("video").srcObject = null;
});

$("shoot").addEventListener("click", () => {
  const canvas = el("canvas", { width: $("video").videoWidth, height: $("video").videoHeight });
  canvas.getContext("2d").drawImage($("video"), 0, 0);
  canvas.toBlob((blob) => {
    if (!blob) return notice("The camera has no image yet. Try again.", true);
    $("camera").close();
    inspect([new File([blob], `camera-${new Date().toISOString().replaceAll(":", "-")}.png`, { type: "image/png" })]);
  }, "image/png");
});

// Buttons, files and keys

const acts = {
  pick: () => $("files").click(),
  camera,
  back: () => {
    state.open = false;
    display();
    withNotice(loadHistory)();
  },
  previous: () => select(state.view, Math.max(0, state.index[state.view] - 1)),
  next: () => select(state.view, state.index[state.view] + 1),
  good: withNotice(() => decide("good")),
  defect: withNotice(() => decide("defect")),
  undo: withNotice(() => current()?.entry?.decision && decide(null)),
  close: (button) => button.closest("dialog").close(),
};

document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button?.dataset.act) acts[button.dataset.act](button);
  else if (button?.dataset.view) show(button.dataset.view);
});

for (const input of [$("files"), $("snap")]) {
  input.addEventListener("change", () => {
    inspect([...input.files]);
    input.value = "";
  });
}

const holdsFiles = (event) => event.dataTransfer?.types.includes("Files");
document.addEventListener("dragover", (event) => {
  if (!holdsFiles(event)) return;
  event.preventDefault();
  $("drop").hidden = false;
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) $("drop").hidden = true;
});
document.addEventListener("drop", (event) => {
  if (!holdsFiles(event)) return;
  event.preventDefault();
  $("drop").hidden = true;
  inspect([...event.dataTransfer.files]);
});
document.addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) inspect([...event.clipboardData.files]);
});

document.addEventListener("keydown", (event) => {
  const inField = event.target.closest("input:not([type=radio], [type=checkbox], [type=range]), select, textarea");
  if (inField || event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  const arrows = !event.target.closest("input"); // sliders and radio buttons use the arrows themselves
  const names = [...$("layers").querySelectorAll("input")].map((input) => input.value);
  const step = (by) => {
    $("blend").value = Number($("blend").value) + by;
    slide();
  };
  const keys = {
    g: acts.good,
    d: acts.defect,
    u: acts.undo,
    o: acts.pick,
    "?": () => $("keys").showModal(),
    "[": () => step(-10),
    "]": () => step(10),
    r: () => $("outlined").click(),
    ...(arrows ? { ArrowLeft: acts.previous, ArrowRight: acts.next } : {}),
    ...Object.fromEntries(names.map((name, i) => [String(i + 1), () => layer(name)])),
  };
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const viewing = !$("viewer").hidden || key === "o" || key === "?";
  if (!keys[key] || !viewing) return;
  event.preventDefault();
  keys[key]();
});

$("detector").addEventListener("change", categories);
$("blend").addEventListener("input", slide);
$("outlined").addEventListener("change", () => current()?.entry && outline(current().entry));
$("more").addEventListener("click", withNotice(() => loadHistory(true)));
$("help").addEventListener("click", () => $("keys").showModal());
let typing;
$("filters").addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(withNotice(() => loadHistory()), 200);
});
$("filters").addEventListener("submit", (event) => event.preventDefault());
$("theme").addEventListener("click", () => {
  const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  document.documentElement.dataset.theme = (document.documentElement.dataset.theme || system) === "dark" ? "light" : "dark";
  store("theme", document.documentElement.dataset.theme);
});

document.documentElement.dataset.theme = stored("theme", "");
$("reviewer").value = stored("reviewer", "");
show("inspect");
setInterval(() => document.visibilityState === "visible" && !away && withNotice(refresh)(), 15000);
