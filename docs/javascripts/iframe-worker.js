// Browsers start no workers in pages opened from a folder (file:). There a frame stands in for the search's worker:
// its script runs inside, messages go both ways, and importScripts becomes script tags that load one after the other.
"use strict"
if (location.protocol === "file:") {
  class IFrameWorker extends EventTarget {
    constructor(url) {
      super()
      this.waiting = []
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      document.body.appendChild(this.frame)
      const inside = this.frame.contentWindow
      inside.document.open()
      inside.document.write("<!doctype html><html><body></body></html>")
      inside.document.close()
      inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
      inside.importScripts = (...urls) => urls.reduce((before, each) => before.then(() => load(inside, each)), Promise.resolve())
      load(inside, url).then(() => {
        const send = data => inside.dispatchEvent(new inside.MessageEvent("message", { data }))
        this.waiting.forEach(send)
        this.waiting = { push: send }
      }, error => this.dispatchEvent(new ErrorEvent("error", { error })))
    }

    postMessage(data) {
      this.waiting.push(data)
    }

    terminate() {
      this.frame.remove()
    }
  }

  const load = (inside, url) => new Promise((done, failed) => {
    const script = inside.document.createElement("script")
    script.src = new URL(url, location.href).href
    script.onload = () => done()
    script.onerror = () => failed(new Error(`cannot load ${url}`))
    inside.document.body.appendChild(script)
  })

  window.IFrameWorker = IFrameWorker // the search's script looks for this name, to find its language files
  window.Worker = IFrameWorker
}
