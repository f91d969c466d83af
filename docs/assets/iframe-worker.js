/* SPDX-License-Identifier: Apache-2.0
 * Search without a server: browsers refuse workers to pages that were opened from a file. There this runs the worker's
 * script in a hidden frame, with the part of a worker's face that the theme's search uses.
 */
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.waiting = []
      const frame = document.createElement("iframe")
      frame.hidden = true
      frame.srcdoc = "<!doctype html>"
      frame.onload = () => this.start(frame.contentWindow, new URL(url, location.href).href)
      document.body.append(frame)
    }

    /* The frame's window stands for the worker's global scope. Loading another script is asynchronous here. */
    start(scope, url) {
      const load = source => new Promise((resolve, reject) => {
        const script = scope.document.createElement("script")
        Object.assign(script, { src: source, onload: resolve, onerror: reject })
        scope.document.body.append(script)
      })
      scope.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
      scope.importScripts = (...sources) => sources.reduce((before, source) =>
        before.then(() => load(new URL(source, url).href)), Promise.resolve())
      load(url).then(() => {
        this.deliver = data => scope.dispatchEvent(new MessageEvent("message", { data }))
        this.waiting.splice(0).forEach(this.deliver)
      }, () => this.dispatchEvent(new Event("error")))
    }

    postMessage(data) {
      if (this.deliver) this.deliver(data)
      else this.waiting.push(data)
    }
  }
}
