// The network in a worker, as the page sees it.

export class Engine {
  #worker = new Worker(new URL("segment.js", import.meta.url), { type: "module" });
  #waiting = new Map();
  #next = 0;

  /** Opens a model with "wasm" or "webgpu"; `height` and `width` are those of a first run. */
  static async open(model, provider, threads, { height, width }) {
    const engine = new Engine();
    engine.provider = provider;
    engine.threads = threads;
    const worker = engine.#worker;
    worker.onmessage = ({ data: { id, result, error } }) => {
      const { resolve, reject } = engine.#waiting.get(id);
      engine.#waiting.delete(id);
      error === undefined ? resolve(result) : reject(new Error(error));
    };
    worker.onerror = (event) => {
      event.preventDefault();
      for (const { reject } of engine.#waiting.values()) reject(new Error(event.message || "a file is missing"));
      engine.#waiting.clear();
    };
    const values = { provider, threads, model: model.providers[provider].model, runtime: model.runtime, height, width };
    try {
      await engine.#ask("open", values);
    } catch (error) {
      engine.close();
      throw error;
    }
    return engine;
  }

  /** The labels of an ImageData: { labels, height, width, milliseconds }. */
  segment({ data, height, width }) {
    return this.#ask("segment", { pixels: data, height, width });
  }

  close() {
    this.#worker.terminate();
  }

  #ask(action, values) {
    const id = this.#next++;
    return new Promise((resolve, reject) => {
      this.#waiting.set(id, { resolve, reject });
      this.#worker.postMessage({ action, id, values });
    });
  }
}
