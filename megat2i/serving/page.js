// The page: sends prompts to /draw and shows the rows that come back. Text of a prompt is only ever set as text.
"use strict";

const HISTORY = "megat2i.history";
const HISTORY_LENGTH = 100;
const SETTINGS = ["n", "seed", "temperature", "top_k", "guidance"];
const byId = (id) => document.getElementById(id);

start();

async function start() {
  byId("form").addEventListener("submit", submit);
  byId("clear").addEventListener("click", () => showHistory(writeHistory([])));
  showHistory(readHistory());
  try {
    const answer = await fetch("health");
    showModel(await answer.json());
  } catch (error) {
    byId("model").textContent = "The server does not answer.";
  }
}

function showModel(health) {
  const size = health.size.replace("x", " × ");
  byId("model").textContent = `${health.model}, ${size} pixels`;
  document.title = `${health.model} – megat2i`;
  byId("prompt").maxLength = health.limits.prompt;
  byId("n").max = health.limits.n;
  byId("seed").max = health.limits.seed;
  for (const name of ["temperature", "top_k", "guidance"]) byId(name).value = health.sampling[name];
  if (!health.guidance) {
    byId("guidance").disabled = true;
    byId("guidance").title = "This model was trained without empty captions and has no guidance.";
  }
}

async function submit(event) {
  event.preventDefault();
  const wanted = { prompt: byId("prompt").value };
  for (const name of SETTINGS) if (byId(name).value !== "" && !byId(name).disabled) wanted[name] = Number(byId(name).value);
  const stopping = new AbortController();
  byId("problem").textContent = "";
  let drawing = null;
  try {
    const answer = await fetch("draw", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(wanted),
      signal: stopping.signal,
    });
    if (!answer.ok) throw new Error((await answer.json()).error.message);
    showHistory(writeHistory([wanted, ...readHistory()]));
    for await (const line of lines(answer.body)) {
      if (line.event === "start") drawing = showDrawing(wanted, line, stopping);
      else if (line.event === "error") throw new Error(line.error.message);
      else showRows(drawing, wanted.prompt, line);
    }
    if (!drawing || drawing.images.some((image) => !image.classList.contains("finished"))) {
      throw new Error("The connection ended before the images were finished.");
    }
    byId("status").textContent = `Finished: ${wanted.prompt}`;
  } catch (error) {
    const place = drawing ? drawing.card.querySelector(".problem") : byId("problem");
    place.textContent = error.name === "AbortError" ? "Stopped." : error.message;
  } finally {
    if (drawing) drawing.card.querySelector(".stop").remove();
  }
}

/** The objects of a stream of lines of JSON. */
async function* lines(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (text + value).split("\n");
    text = parts.pop();
    for (const part of parts) yield JSON.parse(part);
  }
}

function showDrawing(wanted, { seeds, rows }, stopping) {
  const card = byId("drawing-template").content.cloneNode(true).firstElementChild;
  card.querySelector("h2").textContent = wanted.prompt;
  card.querySelector(".facts").textContent = describe(wanted);
  card.querySelector(".stop").addEventListener("click", () => stopping.abort());
  const images = seeds.map((seed) => {
    const image = byId("image-template").content.cloneNode(true).firstElementChild;
    image.querySelector(".seed").textContent = `seed ${seed}`;
    image.querySelector("progress").max = rows;
    image.querySelector("progress").setAttribute("aria-label", `Rows drawn of the image with seed ${seed}`);
    card.querySelector(".images").append(image);
    return image;
  });
  byId("drawings").prepend(card);
  byId("status").textContent = `Drawing: ${wanted.prompt}`;
  return { card, images, seeds };
}

function showRows(drawing, prompt, { event, index, rows, png }) {
  const image = drawing.images[index];
  const picture = image.querySelector("img");
  picture.src = `data:image/png;base64,${png}`;
  picture.alt = prompt;
  image.querySelector("progress").value = rows;
  if (event !== "image") return;
  image.classList.add("finished");
  const save = image.querySelector(".save");
  save.href = picture.src;
  save.download = fileName(prompt, drawing.seeds[index]);
  save.setAttribute("aria-label", `Save the image with seed ${drawing.seeds[index]}`);
  save.hidden = false;
}

function fileName(prompt, seed) {
  const words = prompt.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-+|-+$/g, "");
  return `${[...words].slice(0, 60).join("") || "image"}-${seed}.png`;
}

function describe({ n, seed, temperature, top_k, guidance }) {
  const parts = [`${n} ${n === 1 ? "image" : "images"}`, seed === undefined ? "random seed" : `seed ${seed}`];
  parts.push(`temperature ${temperature}`);
  if (top_k) parts.push(`top-k ${top_k}`);
  if (guidance !== undefined && guidance !== 1) parts.push(`guidance ${guidance}`);
  return parts.join(", ");
}

/** The prompts of this browser, newest first; what is not as this page writes it is left out. */
function readHistory() {
  try {
    const stored = JSON.parse(localStorage.getItem(HISTORY));
    return Array.isArray(stored) ? stored.filter((entry) => entry && typeof entry.prompt === "string") : [];
  } catch (error) {
    return []; // no storage, or another program's text in it
  }
}

function writeHistory(entries) {
  const texts = entries.map((entry) => JSON.stringify(entry));
  const kept = entries.filter((_, number) => texts.indexOf(texts[number]) === number).slice(0, HISTORY_LENGTH);
  try {
    localStorage.setItem(HISTORY, JSON.stringify(kept));
  } catch (error) {
    byId("problem").textContent = "This browser stores no history.";
  }
  return kept;
}

function showHistory(entries) {
  const items = entries.map((entry) => {
    const item = document.createElement("li");
    const button = document.createElement("button");
    const facts = document.createElement("small");
    button.type = "button";
    facts.textContent = describe(entry);
    button.append(entry.prompt, facts);
    button.addEventListener("click", () => fill(entry));
    item.append(button);
    return item;
  });
  byId("history").replaceChildren(...items);
  byId("no-history").hidden = entries.length > 0;
  byId("clear").hidden = entries.length === 0;
}

/** Put an entry of the history into the form. */
function fill(entry) {
  byId("prompt").value = entry.prompt;
  for (const name of SETTINGS) if (!byId(name).disabled) byId(name).value = entry[name] ?? "";
  byId("prompt").focus();
}
