// The site's search runs in a Worker, which browsers refuse to pages opened from disk (file://).
// There a hidden frame takes its place: the script runs inside it and talks through the same messages.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.body.appendChild(Object.assign(document.createElement("iframe"), {hidden: true}));
      const inner = frame.contentWindow;
      this.frame = frame;
      this.ready = new Promise(done => (inner.done = done));
      inner.postMessage = data => setTimeout(() => this.dispatchEvent(new MessageEvent("message", {data})));
      const load = src =>
        new Promise(onload => {
          const script = Object.assign(inner.document.createElement("script"), {src, onload});
          inner.document.body.appendChild(script);
        });
      // One after the other: a script may need those before it.
      inner.importScripts = (...urls) => urls.reduce((before, src) => before.then(() => load(src)), Promise.resolve());
      load(url).then(() => inner.done());
    }
    postMessage(data) {
      this.ready.then(() => this.frame.contentWindow.dispatchEvent(new MessageEvent("message", {data})));
    }
    terminate() {
      this.frame.remove();
    }
  };
}
