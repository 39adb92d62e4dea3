// Browsers start no worker for a page that was opened as a file, and the search runs in a worker.
// Here a hidden frame stands in for it: same script, same messages.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      const told = (data) => {
        const event = new MessageEvent("message", { data });
        this.dispatchEvent(event);
        if (this.onmessage) this.onmessage(event);
      };
      this.ready = new Promise((resolve) => {
        const inner = frame.contentWindow;
        inner.document.open();
        inner.document.write("<html><body></body></html>");
        inner.document.close();
        inner.postMessage = (data) => setTimeout(told, 0, data);
        inner.importScripts = (...urls) =>
          urls.reduce(
            (before, next) =>
              before.then(
                () =>
                  new Promise((done) => {
                    const script = inner.document.createElement("script");
                    script.src = next;
                    script.onload = done;
                    inner.document.body.append(script);
                  }),
              ),
            Promise.resolve(),
          );
        const script = inner.document.createElement("script");
        script.src = url;
        script.onload = () => resolve(inner);
        inner.document.body.append(script);
        this.frame = frame;
      });
    }
    postMessage(data) {
      this.ready.then((inner) => inner.dispatchEvent(new MessageEvent("message", { data })));
    }
    terminate() {
      this.frame.remove();
    }
  };
}
