#!/usr/bin/env python3
"""Opens a report in headless Chromium, checks it as a reader would meet it, and writes screenshots.

    scripts/report_screenshots.py REPORT.html [--out docs/img] [--chromium PATH]

At 1280 and 390 pixels, light and dark: no console message, no request but the file itself, no sideways scroll, no text beyond its box,
no tick label over another, a tooltip at hover, a map that draws, buttons that filter, and a page that is ready in under two seconds.
Standard library alone: DevTools speak over a pair of pipes.
"""
import argparse
import base64
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import zlib

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--remote-debugging-pipe",
]

# Pixels of a picture's height: a long section shows its beginning.
TALLEST = 2000

# Every check in the page returns a list of complaints.
CHECKS = """(() => {
  const bad = [];
  const name = (e) => `${e.tagName.toLowerCase()}${e.id ? "#" + e.id : ""}.${e.getAttribute("class") || ""} ${(e.textContent || "").slice(0, 40)}`;
  if (document.documentElement.scrollWidth > innerWidth) bad.push(`page scrolls sideways: ${document.documentElement.scrollWidth} > ${innerWidth}`);
  const visible = (e) => e.getClientRects().length > 0 && !e.closest(".unseen");
  for (const e of document.querySelectorAll("h1,h2,h3,p,li,td,th,button,summary,figcaption,.tile-card,.tile-card b,select")) {
    if (!visible(e)) continue;
    if (e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display !== "inline") bad.push(`text beyond its box: ${name(e)}`);
    const box = e.getBoundingClientRect();
    if (!e.closest(".scroll,nav") && (box.right > innerWidth + 1 || box.left < -1)) bad.push(`beyond the window: ${name(e)}`);
  }
  for (const svg of document.querySelectorAll("svg")) {
    if (!visible(svg)) continue;
    const frame = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll("text")].map((t) => [t, t.getBoundingClientRect()]);
    for (const [t, b] of texts) {
      if (b.left < frame.left - 2 || b.right > frame.right + 2 || b.top < frame.top - 2 || b.bottom > frame.bottom + 2)
        bad.push(`text beyond its drawing (${svg.getAttribute("aria-label").slice(0, 40)}): ${t.textContent}`);
    }
    const ticks = texts.filter(([t]) => /tick|name|value|title/.test(t.getAttribute("class")));
    for (let i = 0; i < ticks.length; i++) for (let j = 0; j < i; j++) {
      const [a, b] = [ticks[i][1], ticks[j][1]];
      // Glyphs fill some two thirds of a line's box, above and below, and of an upright one's, left and right.
      const shrink = (r) => { const s = Math.min(r.width, r.height) * 0.2; return r.width > r.height ? [r.left, r.right, r.top + s, r.bottom - s] : [r.left + s, r.right - s, r.top, r.bottom]; };
      const [p, q] = [shrink(a), shrink(b)];
      if (p[0] < q[1] - 0.5 && q[0] < p[1] - 0.5 && p[2] < q[3] - 0.5 && q[2] < p[3] - 0.5)
        bad.push(`labels overlap (${svg.getAttribute("aria-label").slice(0, 40)}): ${ticks[i][0].textContent} / ${ticks[j][0].textContent}`);
    }
  }
  for (const c of document.querySelectorAll("canvas")) {
    if (!c.clientWidth) { bad.push("a map without a size"); continue; }
    const pixels = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
    let drawn = 0;
    for (let i = 3; i < pixels.length; i += 4) drawn += pixels[i] > 0;
    if (drawn < 50) bad.push(`an empty map: ${c.id}`);
  }
  if (document.documentElement.dataset.ready !== "yes") bad.push("the script did not finish");
  return bad;
})()"""


class Browser:
    """One headless Chromium with one page."""

    def __init__(self, program):
        self.home = tempfile.TemporaryDirectory()
        to_read, self.write_end = os.pipe()
        self.read_end, to_write = os.pipe()

        def wire():
            # Chromium reads commands from descriptor 3 and writes to 4; the two may stand in each other's way.
            a, b = os.dup(to_read), os.dup(to_write)
            high_read, high_write = 100, 101
            os.dup2(a, high_read)
            os.dup2(b, high_write)
            os.dup2(high_read, 3)
            os.dup2(high_write, 4)

        self.process = subprocess.Popen(
            [program, *FLAGS, f"--user-data-dir={self.home.name}", "about:blank"],
            preexec_fn=wire, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(to_read)
        os.close(to_write)
        self.buffer, self.number, self.events = b"", 0, []
        page = next(t for t in self.call("Target.getTargets", session=None)["targetInfos"] if t["type"] == "page")
        self.session = self.call("Target.attachToTarget", session=None, targetId=page["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def receive(self):
        while b"\0" not in self.buffer:
            chunk = os.read(self.read_end, 1 << 20)
            if not chunk:
                raise RuntimeError("the browser went away")
            self.buffer += chunk
        message, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(message)

    def call(self, method, session="own", **parameters):
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if session == "own":
            message["sessionId"] = self.session
        os.write(self.write_end, json.dumps(message).encode() + b"\0")
        while True:
            reply = self.receive()
            if reply.get("id") == message["id"]:
                if "error" in reply:
                    raise RuntimeError(f"{method}: {reply['error']}")
                return reply["result"]
            self.events.append(reply)

    def value(self, expression):
        reply = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in reply:
            raise RuntimeError(reply["exceptionDetails"]["exception"].get("description", "exception"))
        return reply["result"].get("value")

    def open(self, url, width, height, phone, dark):
        self.events.clear()
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        self.call("Emulation.setEmulatedMedia", features=[
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
            {"name": "prefers-reduced-motion", "value": "reduce"}])
        start = time.monotonic()
        self.call("Page.navigate", url=url)
        while not self.value("document.readyState === 'complete' && document.documentElement.dataset.ready === 'yes'"):
            if time.monotonic() - start > 30:
                raise RuntimeError("the page was not ready within 30 s")
            time.sleep(0.02)
        # Two frames: what the script drew stands on the screen.
        self.value("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        return time.monotonic() - start

    def complaints(self, url):
        found = []
        for event in self.events:
            kind, p = event.get("method"), event.get("params", {})
            if kind == "Network.requestWillBeSent" and p["request"]["url"] != url and not p["request"]["url"].startswith("data:"):
                found.append(f"a request: {p['request']['url']}")
            if kind == "Runtime.consoleAPICalled":
                found.append(f"console: {[a.get('value') for a in p['args']]}")
            if kind == "Runtime.exceptionThrown":
                found.append(f"exception: {p['exceptionDetails'].get('text')}")
            if kind == "Log.entryAdded":
                # The checks read the maps' pixels back, which Chromium remarks upon.
                if "getImageData" not in p["entry"]["text"]:
                    found.append(f"log: {p['entry']['text']}")
        return found

    def move(self, x, y):
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def hover(self, selector):
        """The tooltip's text with the pointer on the first visible match."""
        place = self.value(f"""(() => {{ const e = [...document.querySelectorAll({json.dumps(selector)})].find((e) => e.getClientRects().length);
            if (!e) return null; e.scrollIntoView({{block: "center"}}); const b = e.getBoundingClientRect();
            return [b.left + b.width / 2, b.top + b.height / 2]; }})()""")
        if place is None:
            return None
        self.value("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        self.move(place[0], place[1])
        return self.value("document.getElementById('tip').hidden ? '' : document.getElementById('tip').textContent")

    def picture(self, path, section=None, full=False):
        clip = {}
        if section:
            x, y, w, h = self.value(f"""(() => {{ const e = document.querySelector({json.dumps(section)}); const b = e.getBoundingClientRect();
                return [b.left + scrollX, b.top + scrollY, b.width, b.height]; }})()""")
            clip = {"clip": {"x": x, "y": y, "width": w, "height": min(h, TALLEST), "scale": 1}, "captureBeyondViewport": True}
        elif full:
            size = self.call("Page.getLayoutMetrics")["cssContentSize"]
            clip = {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}, "captureBeyondViewport": True}
        png = base64.b64decode(self.call("Page.captureScreenshot", format="png", **clip)["data"])
        pathlib.Path(path).write_bytes(smaller(png))

    def close(self):
        try:
            self.call("Browser.close", session=None)
        except (RuntimeError, OSError):
            pass
        self.process.wait(timeout=20)
        self.home.cleanup()


def smaller(png):
    """The same picture, deflated as hard as zlib can."""
    place, chunks, data = 8, [], b""
    while place < len(png):
        length = int.from_bytes(png[place:place + 4], "big")
        kind, body = png[place + 4:place + 8], png[place + 8:place + 8 + length]
        place += 12 + length
        if kind == b"IDAT":
            data += body
        elif kind in (b"IHDR", b"IEND"):
            chunks.append((kind, body))
    packed = zlib.compress(zlib.decompress(data), 9)
    chunks.insert(1, (b"IDAT", packed))
    out = png[:8]
    for kind, body in chunks:
        out += len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")
    return out if len(out) < len(png) else png


def check(browser, url, width, dark, seconds):
    phone = width < 600
    took = browser.open(url, width, 844 if phone else 900, phone, dark)
    bad = browser.value(CHECKS)
    if took > seconds:
        bad.append(f"ready after {took:.2f} s")
    marks = "svg [data-tip]"
    if browser.value(f"document.querySelectorAll({json.dumps(marks)}).length") and not browser.hover("svg circle[data-tip],svg rect[data-tip]"):
        bad.append("no tooltip over a mark")
    if browser.value("document.querySelectorAll('svg[data-curve]').length") and "step" not in (browser.hover("svg[data-curve]") or ""):
        bad.append("no values over a curve")
    if browser.value("document.querySelectorAll('canvas').length"):
        bad += maps(browser)
    if browser.value("document.querySelectorAll('select[data-views]').length"):
        bad += browser.value("""(() => { const bad = []; for (const s of document.querySelectorAll("select[data-views]")) for (const o of s.options) {
            s.value = o.value; s.dispatchEvent(new Event("change"));
            const shown = [...document.querySelectorAll(`[data-view^="${s.dataset.views} "]`)].filter((v) => !v.hidden);
            if (shown.length !== 1) bad.push(`choosing ${o.value} shows ${shown.length} views`);
            if (document.documentElement.scrollWidth > innerWidth) bad.push(`choosing ${o.value} makes the page scroll sideways`);
          } for (const s of document.querySelectorAll("select[data-views]")) { s.selectedIndex = 0; s.dispatchEvent(new Event("change")); } return bad; })()""")
    folded = browser.value("""(() => { for (const d of document.querySelectorAll("details")) d.open = true;
        const wide = document.documentElement.scrollWidth > innerWidth; for (const d of document.querySelectorAll("details")) d.open = false; return wide; })()""")
    if folded:
        bad.append("an opened table makes the page scroll sideways")
    browser.move(1, 1)
    browser.value("scrollTo(0, 0)")
    return [f"{width} {'dark' if dark else 'light'}: {b}" for b in bad + browser.complaints(url)], took


def maps(browser):
    """The keyboard finds a cell, its tooltip says which, and the buttons filter."""
    bad = []
    browser.value("document.querySelector('canvas').scrollIntoView({block: 'center'}); document.querySelector('canvas').focus({preventScroll: true})")
    browser.value("new Promise((done) => setTimeout(() => requestAnimationFrame(done), 60))")
    browser.call("Input.dispatchKeyEvent", type="keyDown", key="ArrowRight", code="ArrowRight")
    said = browser.value("document.getElementById('tip').hidden ? '' : document.getElementById('tip').textContent")
    if not said or "\n" not in said:
        bad.append("the keyboard finds no cell in the map")
    ink = """(() => { const c = document.querySelector("canvas"); const p = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
        let n = 0; for (let i = 3; i < p.length; i += 4) n += p[i] > 0; return n; })()"""
    full = browser.value(ink)
    browser.value("document.querySelector('[data-show=none]').click()")
    if browser.value(ink) != 0:
        bad.append("no class chosen, and the map is not empty")
    browser.value("document.querySelector('.classes button').click()")
    if not 0 < browser.value(ink) < full:
        bad.append("one class chosen does not draw one class")
    browser.value("document.querySelector('[data-show=all]').click(); document.activeElement.blur()")
    return bad


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("report", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, default=None, help="folder for the pictures")
    parser.add_argument("--chromium", default="chromium")
    parser.add_argument("--seconds", type=float, default=2.0, help="the page is ready within")
    arguments = parser.parse_args()
    url = arguments.report.resolve().as_uri()
    browser = Browser(arguments.chromium)
    bad = []
    try:
        browser.open(url, 1280, 900, False, False)  # the browser's own start is not the page's
        for width in (1280, 390):
            for dark in (False, True):
                found, took = check(browser, url, width, dark, arguments.seconds)
                bad += found
                print(f"{width} {'dark' if dark else 'light'}: ready in {took:.2f} s, {len(found)} complaints", file=sys.stderr)
                if arguments.out:
                    arguments.out.mkdir(parents=True, exist_ok=True)
                    kind = f"{'phone' if width < 600 else 'desktop'}-{'dark' if dark else 'light'}"
                    browser.picture(arguments.out / f"report-{kind}.png")
                    if not dark:
                        for section in ("scores", "labels", "maps", "prototypes", "curves", "kernels", "settings"):
                            if browser.value(f"!!document.getElementById('{section}')"):
                                browser.picture(arguments.out / f"report-{kind}-{section}.png", section=f"#{section}")
                    elif width > 600:
                        browser.picture(arguments.out / f"report-{kind}-maps.png", section="#maps")
    finally:
        browser.close()
    print("\n".join(bad) if bad else "the report holds")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
