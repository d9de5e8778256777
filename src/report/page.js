// The page without this script shows every chart and table but the maps; here are the tooltip, the theme, the curves' cross hair,
// the choice of a method, and the maps. No library, no request.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const tip = document.getElementById("tip");
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];

  // Tooltip: beside the pointer, never beyond the window.
  const say = (text, x, y) => {
    tip.textContent = text;
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const left = x + 14 + box.width > innerWidth ? x - 14 - box.width : x + 14;
    tip.style.left = Math.max(6, Math.min(left, innerWidth - box.width - 6)) + "px";
    tip.style.top = Math.max(6, y + 16 + box.height > innerHeight ? y - 12 - box.height : y + 16) + "px";
  };
  const hush = () => { tip.hidden = true; };
  document.addEventListener("pointermove", (e) => {
    const mark = e.target.closest && e.target.closest("[data-tip]");
    if (mark) say(mark.getAttribute("data-tip"), e.clientX, e.clientY);
    else if (!(e.target.closest && e.target.closest("[data-curve],canvas"))) hush();
  });
  document.addEventListener("scroll", hush, { passive: true });
  document.addEventListener("keydown", (e) => { if (e.key === "Escape") hush(); });

  // Theme: the system's, or the one chosen here.
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : dark.matches);
  const theme = document.getElementById("theme");
  const redraw = [];
  const themed = () => {
    theme.textContent = isDark() ? "Light" : "Dark";
    theme.setAttribute("aria-label", `Change to the ${isDark() ? "light" : "dark"} theme`);
    redraw.forEach((draw) => draw());
  };
  theme.hidden = false;
  theme.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; themed(); });
  dark.addEventListener("change", themed);

  // One view of several: a select with data-views="name" shows the element data-view="name value".
  all("select[data-views]").forEach((select) => {
    const show = () => all(`[data-view^="${select.dataset.views} "]`).forEach((view) => {
      view.hidden = view.dataset.view !== `${select.dataset.views} ${select.value}`;
    });
    select.closest(".controls").hidden = false;
    select.addEventListener("change", show);
    show();
  });

  // Curves: the values of all runs at the step under the pointer.
  const plain = (v) => (v === 0 ? "0" : Math.abs(v) >= 1e4 || Math.abs(v) < 1e-3 ? v.toExponential(2) : String(+v.toPrecision(4)));
  all("svg[data-curve]").forEach((svg) => {
    const curve = data.curves[+svg.dataset.curve];
    const [left, right, first, last] = svg.dataset.frame.split(" ").map(Number);
    const cross = document.createElementNS("http://www.w3.org/2000/svg", "line");
    cross.setAttribute("class", "cross");
    svg.addEventListener("pointermove", (e) => {
      const box = svg.getBoundingClientRect();
      const at = ((e.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
      const step = first + ((at - left) / (right - left)) * (last - first);
      let nearest = null;
      const lines = curve.series.map((s) => {
        let i = 0;
        s.x.forEach((x, j) => { if (Math.abs(x - step) < Math.abs(s.x[i] - step)) i = j; });
        if (nearest === null || Math.abs(s.x[i] - step) < Math.abs(nearest - step)) nearest = s.x[i];
        return `${data.runs[s.run]}: ${plain(s.y[i])} (step ${s.x[i]})`;
      });
      const x = left + ((nearest - first) / (last - first)) * (right - left);
      for (const [k, v] of [["x1", x], ["x2", x], ["y1", 24], ["y2", 144]]) cross.setAttribute(k, v);
      svg.append(cross);
      say(`${curve.title}\n${lines.join("\n")}`, e.clientX, e.clientY);
    });
    svg.addEventListener("pointerleave", () => { cross.remove(); hush(); });
  });

  // Maps.
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const words = (text) => new Uint16Array(bytes(text).buffer);
  const hues = [215, 18, 165, 285, 45, 335, 95, 190, 255, 0, 130, 310, 70, 235, 30, 150, 350, 200, 270, 110];
  const colour = (k) => {
    const round = Math.floor(k / hues.length);
    const light = (isDark() ? [66, 80, 54] : [46, 62, 34])[(k + round) % 3];
    return `hsl(${(hues[k % hues.length] + 9 * round) % 360} ${round % 2 ? 45 : 68}% ${light}%)`;
  };
  data.sets.forEach((set, number) => {
    set.ids = set.ids.split("\n");
    set.class = words(set.class);
    const hidden = new Set();
    const planes = data.planes.filter((p) => p.set === number);
    const holder = document.getElementById(`maps-${number}`);
    let marked = -1;
    planes.forEach((plane) => {
      plane.at = words(plane.at);
      plane.called = plane.called ? words(plane.called) : null;
      plane.canvas = document.getElementById(`map-${plane.index}`);
      plane.out = document.getElementById(`said-${plane.index}`);
    });
    const draw = (plane) => {
      const canvas = plane.canvas;
      const size = canvas.clientWidth;
      if (!size) return;
      const ratio = Math.min(devicePixelRatio || 1, 2);
      canvas.width = canvas.height = Math.round(size * ratio);
      const pen = canvas.getContext("2d");
      pen.setTransform(ratio, 0, 0, ratio, 0, 0);
      const n = set.class.length;
      const radius = Math.max(0.8, Math.min(3.2, 60 / Math.sqrt(n)) * Math.sqrt(size / 480));
      const place = plane.place = (i) => [10 + (plane.at[2 * i] / 65535) * (size - 20), size - 10 - (plane.at[2 * i + 1] / 65535) * (size - 20)];
      const byClass = set.classes.map(() => []);
      for (let i = 0; i < n; i++) byClass[set.class[i]].push(i);
      const edge = getComputedStyle(root).getPropertyValue("--surface");
      // Tail classes last, so that they lie on top, larger and with an edge.
      const order = set.classes.map((_, k) => k).sort((a, b) => set.tail[a] - set.tail[b] || byClass[b].length - byClass[a].length);
      for (const k of order) {
        if (hidden.has(k)) continue;
        pen.fillStyle = colour(k);
        pen.globalAlpha = set.tail[k] ? 1 : n > 5000 ? 0.6 : 0.8;
        if (n > 8000 && !set.tail[k]) {
          for (const i of byClass[k]) { const [x, y] = place(i); pen.fillRect(x - radius, y - radius, 2 * radius, 2 * radius); }
        } else {
          const r = set.tail[k] ? Math.max(radius * 1.45, 2.6) : radius;
          for (const i of byClass[k]) {
            const [x, y] = place(i);
            pen.beginPath(); pen.arc(x, y, r, 0, 7);
            pen.fill();
            if (set.tail[k]) { pen.strokeStyle = edge; pen.lineWidth = 1; pen.stroke(); }
          }
        }
      }
      pen.globalAlpha = 1;
      if (marked >= 0) {
        const [x, y] = place(marked);
        pen.beginPath(); pen.arc(x, y, radius + 5, 0, 7);
        pen.strokeStyle = getComputedStyle(root).getPropertyValue("--text"); pen.lineWidth = 1.6; pen.stroke();
      }
    };
    const drawAll = () => planes.forEach(draw);
    const about = (plane, i) => {
      const called = plane.called ? `\ncalled ${plane.names[plane.called[i]]}` : "";
      return `${set.ids[i]}\n${set.labelled ? "label" : "nearest prototype"}: ${set.classes[set.class[i]]}${set.tail[set.class[i]] ? " (tail)" : ""}${called}`;
    };
    const nearest = (plane, x, y) => {
      let best = -1, least = 14 * 14;
      for (let i = 0; i < set.class.length; i++) {
        if (hidden.has(set.class[i])) continue;
        const [px, py] = plane.place(i);
        const d = (px - x) ** 2 + (py - y) ** 2;
        if (d < least) { least = d; best = i; }
      }
      return best;
    };
    planes.forEach((plane) => {
      const mark = (i, x, y) => {
        if (i !== marked) { marked = i; drawAll(); }
        if (i >= 0) { say(about(plane, i), x, y); plane.out.textContent = about(plane, i); } else hush();
      };
      plane.canvas.addEventListener("pointermove", (e) => {
        const box = plane.canvas.getBoundingClientRect();
        mark(nearest(plane, e.clientX - box.left, e.clientY - box.top), e.clientX, e.clientY);
      });
      plane.canvas.addEventListener("pointerleave", () => { marked = -1; drawAll(); hush(); });
      plane.canvas.addEventListener("keydown", (e) => {
        const by = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[e.key];
        if (!by) return;
        e.preventDefault();
        const n = set.class.length;
        let i = marked < 0 ? (by > 0 ? -1 : n) : marked;
        for (let tries = 0; tries < n; tries++) { i = (i + by + n) % n; if (!hidden.has(set.class[i])) break; }
        const box = plane.canvas.getBoundingClientRect();
        const [x, y] = plane.place(i);
        mark(i, box.left + x, box.top + y);
      });
    });
    const buttons = all(".classes button[data-class]", holder);
    const shown = () => {
      buttons.forEach((b) => b.setAttribute("aria-pressed", String(!hidden.has(+b.dataset.class))));
      marked = -1;
      drawAll();
    };
    buttons.forEach((b) => b.addEventListener("click", () => {
      const k = +b.dataset.class;
      if (!hidden.delete(k)) hidden.add(k);
      shown();
    }));
    all("button[data-show]", holder).forEach((b) => b.addEventListener("click", () => {
      hidden.clear();
      if (b.dataset.show === "tail") set.tail.forEach((t, k) => { if (!t) hidden.add(k); });
      if (b.dataset.show === "none") set.tail.forEach((_, k) => hidden.add(k));
      shown();
    }));
    const paint = () => {
      all(".swatch[data-class]", holder).forEach((s) => { s.style.background = colour(+s.dataset.class); });
      drawAll();
    };
    holder.hidden = false;
    redraw.push(paint);
    let last = 0;
    new ResizeObserver(() => {
      const width = planes[0].canvas.clientWidth;
      if (width !== last) { last = width; drawAll(); }
    }).observe(holder);
  });
  themed();
  root.dataset.ready = "yes";
})();
