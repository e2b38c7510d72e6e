// The page: takes a picture or the camera, has its pixels segmented, and shows labels, classes and times.

import { Engine } from "./engine.js";

const find = (id) => document.getElementById(id);
const LARGEST_SIDE = 1600; // pixels of what is shown; phones have pictures of 50 million pixels
const LEGEND_PAUSE = 500; // milliseconds between changes of the list beside a camera
const ALLOWED_DIFFERENCE = 1e-3; // of the labels, between WebGPU and wasm: where two classes tie

let model, engine, reference; // reference: wasm, while WebGPU has yet to be compared with it
let shown; // the last frame: { name, pixels, labels, height, width, counts, milliseconds, whole }
let only = null; // the one class to show
let stream = null; // the camera's
let legendTime = 0;
let queue = Promise.resolve(); // everything that uses the engine, one after the other

const input = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
const picture = find("picture").getContext("2d");
const overlay = find("overlay").getContext("2d");

class Problem extends Error {} // a sentence for the reader

function say(text) {
  find("status").textContent = text;
}

function complain(error) {
  if (!(error instanceof Problem)) console.error(error);
  find("problem").textContent = error instanceof Problem ? error.message : `It did not work: ${error.message}`;
}

/** Runs a task after those before it; what fails is shown. */
function enqueue(task) {
  queue = queue.then(task).catch(complain);
  return queue;
}

// Pictures

/** Height and width that the network sees of a picture. */
function inputSize(height, width) {
  if (model.size) return { height: model.size[0], width: model.size[1] };
  const scale = Math.sqrt(model.area / (height * width));
  return { height: Math.max(32, Math.round(height * scale)), width: Math.max(32, Math.round(width * scale)) };
}

/** A picture's pixels at the network's size, on white where it is transparent. */
function readPixels(source, height, width) {
  const size = inputSize(height, width);
  Object.assign(input.canvas, size);
  input.imageSmoothingQuality = "high";
  input.fillStyle = "#fff";
  input.fillRect(0, 0, size.width, size.height);
  input.drawImage(source, 0, 0, size.width, size.height);
  return input.getImageData(0, 0, size.width, size.height);
}

/** Segments a picture or a frame of a video, and shows it. */
async function segment(source, height, width, name) {
  const start = performance.now();
  const pixels = readPixels(source, height, width);
  const scale = Math.min(1, LARGEST_SIDE / Math.max(height, width));
  const frame = stream && (await createImageBitmap(source)); // the video goes on meanwhile
  const result = await engine.segment(pixels);
  const counts = new Uint32Array(256);
  for (const label of result.labels) counts[label]++;
  const size = { height: Math.round(height * scale), width: Math.round(width * scale) };
  if (picture.canvas.height !== size.height || picture.canvas.width !== size.width) {
    Object.assign(picture.canvas, size);
  }
  picture.imageSmoothingQuality = "high";
  picture.drawImage(frame || source, 0, 0, size.width, size.height);
  frame?.close();
  find("stage").classList.add("filled");
  find("stage").style.setProperty("--ratio", width / height);
  shown = { name, pixels, counts, ...result };
  drawOverlay();
  shown.whole = performance.now() - start;
  window.shown = shown; // for who looks from the console, and for tests
  if (reference) await compareWithReference();
  showLegend();
}

function drawOverlay() {
  if (!shown) return;
  const { labels, height, width } = shown;
  const colours = new Uint32Array(256);
  const bytes = new Uint8Array(colours.buffer);
  model.palette.forEach((colour, label) => {
    if (only === null || only === label) bytes.set([...colour, 255], 4 * label);
  });
  Object.assign(overlay.canvas, { height, width });
  const image = overlay.createImageData(width, height);
  const target = new Uint32Array(image.data.buffer);
  for (let index = 0; index < target.length; index++) target[index] = colours[labels[index]];
  overlay.putImageData(image, 0, 0);
}

async function openFile(file) {
  find("problem").textContent = "";
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    throw new Problem(`${file.name || "This"} is no picture that this browser can read.`);
  }
  stopCamera();
  say("Segmenting…");
  again = () => segment(bitmap, bitmap.height, bitmap.width, file.name || "Picture");
  await again();
}

let again = null; // segments the picture once more

// Camera

async function startCamera() {
  find("problem").textContent = "";
  if (!navigator.mediaDevices?.getUserMedia) {
    throw new Problem("Browsers give the camera to pages of https and of localhost only.");
  }
  try {
    stream = await navigator.mediaDevices.getUserMedia({
      video: { facingMode: "environment", width: { ideal: 1280 }, height: { ideal: 720 } },
    });
  } catch (error) {
    const sentences = {
      NotAllowedError: "The browser does not let this page use the camera: allow it beside the address.",
      NotFoundError: "There is no camera on this device.",
      NotReadableError: "Another program is using the camera.",
    };
    throw new Problem(sentences[error.name] ?? `The camera cannot be used: ${error.message}`);
  }
  const current = stream;
  const video = Object.assign(document.createElement("video"), { muted: true, playsInline: true, srcObject: stream });
  stream.getVideoTracks()[0].onended = stopCamera;
  showCamera(true);
  again = null;
  const next = async () => {
    if (stream !== current) return;
    try {
      await segment(video, video.videoHeight, video.videoWidth, "Camera");
    } catch (error) {
      stopCamera();
      throw error;
    }
    requestAnimationFrame(() => enqueue(next)); // frames that came meanwhile are left out
  };
  await video.play();
  await next();
}

function stopCamera() {
  for (const track of stream?.getTracks() ?? []) track.stop();
  stream = null;
  showCamera(false);
  if (shown) showLegend();
}

function showCamera(on) {
  find("camera").classList.toggle("on", on);
  find("camera").textContent = on ? "Stop camera" : "Camera";
  find("status").setAttribute("aria-live", on ? "off" : "polite");
}

// The list of classes

const percent = (share) => (share < 0.001 ? "< 0.1 %" : `${(100 * share).toFixed(1)} %`);

function showLegend() {
  const { name, labels, counts, whole, milliseconds } = shown;
  const found = [...counts.keys()].filter((label) => counts[label]).sort((a, b) => counts[b] - counts[a]);
  const largest = found[0];
  say(`${Math.round(whole)} ms a frame, ${Math.round(milliseconds)} of them the network.`);
  const summary = `${found.length} classes, the largest: ${model.classes[largest]}, ${percent(counts[largest] / labels.length)}.`;
  picture.canvas.setAttribute("aria-label", `${name}: ${summary}`);
  const list = find("legend");
  const isBusy = list.contains(document.activeElement) || list.matches(":hover");
  if (stream && (performance.now() < legendTime + LEGEND_PAUSE || isBusy)) return;
  legendTime = performance.now();
  find("found").textContent = `${found.length} ${found.length === 1 ? "class" : "classes"}`;
  find("about").textContent = "Choose a class to show it alone.";
  if (!stream) say(`${find("status").textContent} ${summary}`);
  if (only !== null && !counts[only]) showOnly(null);
  list.replaceChildren(...found.map((label) => legendItem(label, counts[label] / labels.length)));
}

function legendItem(label, share) {
  const item = document.createElement("li");
  const button = document.createElement("button");
  button.type = "button";
  button.dataset.label = label;
  button.setAttribute("aria-pressed", only === label);
  const swatch = document.createElement("i");
  swatch.style.background = `rgb(${model.palette[label]})`;
  const number = document.createElement("span");
  number.textContent = percent(share);
  const bar = document.createElement("div");
  bar.className = "share";
  bar.style.width = `${100 * share}%`;
  button.append(swatch, model.classes[label], number, bar);
  button.onclick = () => showOnly(only === label ? null : label);
  item.append(button);
  return item;
}

function showOnly(label) {
  only = label;
  for (const button of find("legend").querySelectorAll("button")) {
    button.setAttribute("aria-pressed", Number(button.dataset.label) === only);
  }
  drawOverlay();
}

// What computes

/** Opens the network with what the list says, "wasm 2" or "webgpu"; on an error the one before stays. */
async function changeDevice(choice) {
  const [provider, threads] = choice.split(" ");
  const megabytes = Math.round(model.providers[provider].bytes / 1e6);
  say(`Loading the network (${megabytes} MB the first time)…`);
  find("problem").textContent = "";
  const size = shown ? { height: shown.pixels.height, width: shown.pixels.width } : inputSize(3, 4);
  const before = engine;
  try {
    engine = await Engine.open(model, provider, Number(threads ?? 1), size);
  } catch (error) {
    find("device").value = before?.choice ?? "";
    say("");
    throw new Problem(`The network cannot run on ${provider === "wasm" ? "the processor" : "WebGPU"}: ${error.message}`);
  }
  engine.choice = choice;
  if (reference !== before) reference?.close();
  reference = provider === "webgpu" && before?.provider === "wasm" ? before : null;
  if (!reference) before?.close();
  say("Ready.");
  if (again) await again();
}

/** Compares WebGPU's labels with wasm's on the picture that is shown, and goes back where they differ. */
async function compareWithReference() {
  const { labels } = await reference.segment(shown.pixels);
  let different = 0;
  labels.forEach((label, index) => (different += label !== shown.labels[index]));
  const share = different / labels.length;
  const isRight = share <= ALLOWED_DIFFERENCE;
  const wrong = engine;
  if (!isRight) engine = reference;
  (isRight ? reference : wrong).close();
  reference = null;
  if (isRight) {
    find("hint").textContent = `WebGPU compared with the processor: ${different} of ${labels.length} labels differ.`;
    return;
  }
  find("device").value = engine.choice;
  complain(new Problem(`WebGPU is wrong here: ${percent(share)} of its labels differ from the processor's. The processor goes on.`));
  find("device").querySelector("[value=webgpu]")?.remove();
  if (again) await again();
}

/** Lists what can compute here, and says what cannot. */
async function listDevices() {
  const threads = self.crossOriginIsolated ? Math.min(navigator.hardwareConcurrency || 1, 4) : 1;
  const choices = Array.from({ length: threads }, (_, index) => index + 1)
    .filter((count) => [1, 2, 4, threads].includes(count))
    .map((count) => [`wasm ${count}`, `Processor (wasm), ${count} ${count === 1 ? "thread" : "threads"}`]);
  const hints = [];
  if (!self.crossOriginIsolated) {
    hints.push(
      navigator.serviceWorker
        ? "One thread: reload the page, and it may use more."
        : "One thread: pages of https and of localhost can use more.",
    );
  }
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  if (!model.providers.webgpu) hints.push("No WebGPU: the page was made for processors.");
  else if (adapter) choices.push(["webgpu", "WebGPU"]);
  else hints.push("No WebGPU: this browser or device has none.");
  find("device").replaceChildren(...choices.map(([value, text]) => new Option(text, value)));
  find("device").value = `wasm ${threads}`;
  find("hint").textContent = hints.join(" ");
}

// The start

function listen() {
  const stage = find("stage");
  const take = (file) => file && enqueue(() => openFile(file));
  find("choose").onclick = () => find("file").click();
  find("file").onchange = ({ target }) => {
    take(target.files[0]);
    target.value = ""; // so that the same file can be chosen again
  };
  find("camera").onclick = () => (stream ? stopCamera() : enqueue(startCamera));
  find("device").onchange = ({ target }) => enqueue(() => changeDevice(target.value));
  find("opacity").oninput = ({ target }) => {
    overlay.canvas.style.opacity = target.value / 100;
    find("percent").textContent = `${target.value} %`;
  };
  find("opacity").oninput({ target: find("opacity") });
  addEventListener("dragover", (event) => {
    event.preventDefault();
    stage.classList.add("over");
  });
  addEventListener("dragleave", () => stage.classList.remove("over"));
  addEventListener("drop", (event) => {
    event.preventDefault();
    stage.classList.remove("over");
    take(event.dataTransfer.files[0]);
  });
  addEventListener("paste", (event) => take(event.clipboardData.files[0]));
  stage.onpointermove = stage.onpointerdown = ({ clientX, clientY }) => {
    if (!shown) return;
    const box = overlay.canvas.getBoundingClientRect();
    const column = Math.floor(((clientX - box.left) / box.width) * shown.width);
    const row = Math.floor(((clientY - box.top) / box.height) * shown.height);
    const isInside = row >= 0 && row < shown.height && column >= 0 && column < shown.width;
    find("pointed").hidden = !isInside;
    if (isInside) find("pointed").textContent = model.classes[shown.labels[row * shown.width + column]];
  };
  stage.onpointerleave = () => (find("pointed").hidden = true);
}

async function start() {
  if (!self.WebAssembly) throw new Problem("This browser has no WebAssembly, and the network needs it.");
  const response = await fetch("model.json");
  if (!response.ok) throw new Problem("model.json is missing beside this page: write its folder again.");
  model = await response.json();
  const size = model.size ? `${model.size[1]} × ${model.size[0]} pixels` : "any size";
  find("facts").textContent = `${model.name}, ${model.classes.length} classes, ${size}`;
  await listDevices();
  await changeDevice(find("device").value);
  for (const id of ["choose", "camera", "device"]) find(id).disabled = false;
  listen();
  document.body.dataset.ready = "yes";
  if (!navigator.serviceWorker) return;
  await navigator.serviceWorker.register("offline.js");
  await navigator.serviceWorker.ready;
  find("offline").textContent = "It works without a network from now on.";
}

enqueue(start);
