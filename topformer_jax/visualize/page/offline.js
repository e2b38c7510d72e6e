// The service worker: keeps the page for use without a network, and isolates it, so that wasm has threads where the
// server does not send the headers itself. It needs https or localhost.

const KEPT = "topformer_jax";
const PAGE = ["./", "style.css", "page.js", "engine.js", "segment.js", "icon.svg", "model.json"];
const ISOLATION = {
  "Cross-Origin-Opener-Policy": "same-origin",
  "Cross-Origin-Embedder-Policy": "require-corp",
  "Cross-Origin-Resource-Policy": "same-origin",
};

/** Addresses of models and the runtime, whose names say their version: what is kept of them stays right. */
const fixed = (model) =>
  Object.values(model.providers)
    .flatMap((provider) => provider.files)
    .map((name) => new URL(name, registration.scope).href);

async function install() {
  const model = await (await fetch("model.json")).json();
  const cache = await caches.open(KEPT);
  for (const name of model.providers.wasm.files) if (!(await cache.match(name))) await cache.add(name);
  await cache.addAll(PAGE);
}

/** Keeps a file; a new model.json makes room by dropping what belongs to the one before. */
async function keep(cache, request, response) {
  await cache.put(request, response.clone());
  if (!new URL(request.url).pathname.endsWith("/model.json")) return;
  const names = fixed(await response.json());
  for (const { url } of await cache.keys()) {
    // Another page may lie below this one.
    const own = url.startsWith(registration.scope) ? url.slice(registration.scope.length) : "";
    const isFixed = /^(model\w*\.onnx\?|onnxruntime-web-[^/]+\/)/.test(own);
    if (isFixed && !names.includes(url)) await cache.delete(url);
  }
}

async function answer(event) {
  const { request } = event;
  const cache = await caches.open(KEPT);
  const isFixed = /\.onnx\?|\.mjs$|\.wasm$/.test(request.url);
  let response = isFixed ? await cache.match(request.url) : undefined;
  if (!response) {
    try {
      response = await fetch(request);
      if (response.ok) event.waitUntil(keep(cache, request, response.clone()));
    } catch {
      const isPage = request.mode === "navigate";
      response = await cache.match(isPage ? registration.scope : request.url);
      if (!response) return Response.error();
    }
  }
  const headers = new Headers(response.headers);
  for (const [name, value] of Object.entries(ISOLATION)) headers.set(name, value);
  return new Response(response.body, { status: response.status, statusText: response.statusText, headers });
}

addEventListener("install", (event) => event.waitUntil(install()));
addEventListener("fetch", (event) => {
  const isOwn = event.request.method === "GET" && event.request.url.startsWith(registration.scope);
  if (isOwn) event.respondWith(answer(event));
});
