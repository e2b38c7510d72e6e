// The worker: opens the network in onnxruntime-web, and turns pixels into labels, so that the page stays responsive.

let session, ort;

/** Opens the network, and runs it once: the first run allocates memory and compiles shaders. */
async function open({ provider, threads, model, runtime, height, width }) {
  ort = await import(`./${runtime}/ort.${provider}.min.mjs`);
  ort.env.wasm.numThreads = threads;
  ort.env.wasm.wasmPaths = new URL(`./${runtime}/`, location.href).href;
  ort.env.logLevel = "error";
  const response = await fetch(model);
  if (!response.ok) throw new Error(`cannot load ${model}: the server answers ${response.status}`);
  const bytes = new Uint8Array(await response.arrayBuffer());
  session = await ort.InferenceSession.create(bytes, { executionProviders: [provider], logSeverityLevel: 3 });
  await segment({ pixels: new Uint8ClampedArray(4 * height * width), height, width });
}

/** The labels of an image: RGBA in, as a canvas has them; out uint8 of height / stride rows. */
async function segment({ pixels, height, width }) {
  const start = performance.now();
  const images = new Uint8Array(3 * height * width);
  for (let from = 0, to = 0; to < images.length; from += 4) {
    images[to++] = pixels[from];
    images[to++] = pixels[from + 1];
    images[to++] = pixels[from + 2];
  }
  const input = new ort.Tensor("uint8", images, [1, height, width, 3]);
  const outputs = await session.run({ [session.inputNames[0]]: input });
  const output = outputs[session.outputNames[0]];
  const labels = await output.getData();
  return { labels, height: output.dims[1], width: output.dims[2], milliseconds: performance.now() - start };
}

const actions = { open, segment };

onmessage = async ({ data: { action, id, values } }) => {
  try {
    postMessage({ id, result: await actions[action](values) });
  } catch (error) {
    postMessage({ id, error: error?.message ?? String(error) });
  }
};
