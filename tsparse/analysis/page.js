/* Draws the charts of the page from the JSON in #data: SVG as text, redrawn when a control or the width changes. */
(function () {
  "use strict";
  const DATA = JSON.parse(document.getElementById("data").textContent);
  const DASHES = ["", "6 3", "2 3", "8 3 2 3", "12 4", "2 2 2 6", "12 3 2 3 2 3"];
  const colour = (model) => DATA.colours[DATA.models.indexOf(model) % DATA.colours.length];
  const escaped = (text) => String(text).replace(/[&<>"]/g, (c) => "&#" + c.charCodeAt(0) + ";");
  const unique = (list) => [...new Set(list)];

  /* Numbers: four significant digits, grouped, without trailing zeros. */
  function shown(value, percent, digits = 4) {
    if (value === null) return "not finite";
    if (percent) return +(100 * value).toPrecision(digits) + "%";
    const size = Math.abs(value);
    if (size && (size < 1e-3 || size >= 1e7)) return value.toExponential(1);
    return (+value.toPrecision(digits)).toLocaleString("en-US", { maximumFractionDigits: 6 });
  }

  function linearTicks(low, high, count) {
    const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
    const step = power * [1, 2, 2.5, 5, 10].find((m) => m * power >= raw * 0.999);
    const ticks = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) ticks.push(i * step);
    return ticks;
  }

  function logTicks(low, high, count, base) {
    const found = (steps) => {
      const ticks = [];
      for (let e = Math.floor(Math.log(low) / Math.log(base)); base ** e <= high * 1.001; e++)
        for (const m of steps) if (m * base ** e >= low * 0.999 && m * base ** e <= high * 1.001) ticks.push(m * base ** e);
      return ticks;
    };
    if (base === 2) return found([1]);
    let ticks = found([1, 2, 5]);
    if (ticks.length < 2) return linearTicks(low, high, count);
    if (ticks.length > count + 2) ticks = found([1]);
    return ticks.filter((_, i) => i % Math.ceil(ticks.length / (count + 2)) === 0);
  }

  /* The scale of values [low, high] on pixels [from, to]. */
  function scale(values, axis, log, from, to, count, base) {
    let low = Math.min(...values), high = Math.max(...values);
    if (axis.limits && !log) [low, high] = axis.limits;
    else if (log) { const pad = (high / low) ** 0.04 || 1.05; low /= pad; high *= pad; }
    else { const pad = (high - low || Math.abs(high) || 1) * 0.05; low = low >= 0 ? Math.max(0, low - pad) : low - pad; high += pad; }
    if (high <= low) high = low + 1;
    const f = log ? Math.log : (x) => x;
    const place = (x) => from + ((f(x) - f(low)) / (f(high) - f(low))) * (to - from);
    let ticks = log ? logTicks(low, high, count, base) : linearTicks(low, high, count);
    if (axis.label === "layer" || axis.label === "expert") ticks = ticks.filter(Number.isInteger);
    return { place, ticks };
  }

  function frame(width, height, left, x, y, view) {
    const bottom = height - 46, right = width - 22;
    let out = "";
    for (const t of y.ticks) {
      const at = y.place(t).toFixed(1);
      out += `<line class="grid" x1="${left}" x2="${right}" y1="${at}" y2="${at}"></line>`;
      out += `<text x="${left - 8}" y="${+at + 4}" text-anchor="end">${shown(t, view.y.percent)}</text>`;
    }
    for (const t of x.ticks) {
      const at = x.place(t).toFixed(1);
      out += `<line class="grid" x1="${at}" x2="${at}" y1="24" y2="${bottom}"></line>`;
      out += `<text x="${at}" y="${bottom + 17}" text-anchor="middle">${shown(t, view.x.percent)}</text>`;
    }
    out += `<text x="${(left + right) / 2}" y="${height - 8}" text-anchor="middle">${escaped(view.x.label)}</text>`;
    return out + `<text x="0" y="12">${escaped(view.y.label)}</text>`;
  }

  /* Each kind of chart returns {svg, height, points}: points are what hovering finds, {x, y, text}. */
  const KINDS = {
    lines(view, state, width) {
      const series = view.data.filter((s) => !state.off.has(s.model) && !(s.style && state.off.has("." + s.style)));
      const height = Math.round(Math.min(400, Math.max(270, width * 0.5)));
      const all = (series.length ? series : view.data).flatMap((s) => s.points);
      const xs = all.map((p) => p[0]), positive = all.map((p) => p[1]).filter((v) => v > 0);
      const ys = state.log && positive.length ? positive : all.map((p) => p[1]);
      const few = Math.max(2, Math.floor(width / 80));
      const draft = scale(ys, view.y, state.log, height - 46, 24, 5, 10);
      const left = 14 + 7.2 * Math.max(...draft.ticks.map((t) => shown(t, view.y.percent).length));
      const logX = view.x.scale === "log" && Math.min(...xs) > 0;
      const x = scale(xs, view.x, logX, left, width - 22, few, 2), y = draft;
      let svg = frame(width, height, left, x, y, view);
      const points = [], styles = unique(view.data.map((s) => s.style).filter(Boolean));
      for (const s of series) {
        const kept = s.points.filter((p) => !state.log || p[1] > 0), c = colour(s.model);
        const at = kept.map((p) => [x.place(p[0]), y.place(p[1])]);
        kept.forEach((p, i) => points.push({ x: at[i][0], y: at[i][1], colour: c, text:
          `<b>${escaped(s.model)}</b>${s.mark === "ring" ? " as it is" : s.label || s.style ? " · " + escaped(s.label || s.style) : ""}<br>` +
          `${escaped(view.x.label)}: ${shown(p[0], view.x.percent)}<br>${escaped(view.y.label)}: ${shown(p[1], view.y.percent)}` }));
        const f = (v) => v.toFixed(1);
        if (s.mark === "ring") svg += at.map((p) => `<circle cx="${f(p[0])}" cy="${f(p[1])}" r="7" fill="none" stroke="${c}" stroke-width="2"></circle>`).join("");
        else if (s.mark === "dots") svg += at.map((p) => `<circle cx="${f(p[0])}" cy="${f(p[1])}" r="2.6" fill="${c}" fill-opacity=".55"></circle>`).join("");
        else if (s.mark === "thin") svg += `<path d="${at.map((p, i) => (i ? "L" : "M") + f(p[0]) + " " + f(p[1])).join("")}" fill="none" stroke="${c}" stroke-width="1" stroke-opacity=".6"></path>`;
        else {
          const dash = DASHES[Math.max(0, styles.indexOf(s.style)) % DASHES.length];
          let path = at.map((p, i) => (i ? "L" : "M") + f(p[0]) + " " + f(p[1])).join("");
          if (s.mark === "step" && at.length > 1) {
            const half = (at[1][0] - at[0][0]) / 2;
            path = at.map((p, i) => (i ? "L" : "M") + f(p[0] - half) + " " + f(p[1]) + "H" + f(p[0] + half)).join("");
          }
          svg += `<path d="${path}" fill="none" stroke="${c}" stroke-width="2" stroke-linejoin="round" stroke-dasharray="${dash}"></path>`;
          if (at.length <= 40 && s.mark === "line") svg += at.map((p) => `<circle cx="${f(p[0])}" cy="${f(p[1])}" r="3" fill="${c}"></circle>`).join("");
        }
      }
      return { svg, height, points };
    },

    intervals(view, state, width) {
      const rows = view.data.filter((r) => !state.off.has(r.model)), height = 76 + 44 * rows.length;
      const values = (rows.length ? rows : view.data).flatMap((r) => [r.low, r.high]);
      const spread = Math.max(...values) - Math.min(...values) || 1e-9;
      const limits = [Math.min(...values) - 0.06 * spread, Math.max(...values) + 0.06 * spread];
      const x = scale(values, { limits }, false, 8, width - 22, Math.max(2, Math.floor(width / 110)), 10);
      let svg = frame(width, height, 8, x, { ticks: [] }, view);
      const points = [];
      rows.forEach((r, i) => {
        const at = 56 + 44 * i, c = colour(r.model);
        const low = x.place(r.low), high = x.place(r.high);
        svg += `<text class="name" x="8" y="${at - 14}">${escaped(r.model)}</text>`;
        svg += `<line x1="${low}" x2="${high}" y1="${at}" y2="${at}" stroke="${c}" stroke-width="4"></line>`;
        svg += `<circle cx="${x.place(r.value)}" cy="${at}" r="5.5" fill="${c}"></circle>`;
        points.push({ x: x.place(r.value), y: at, colour: c, text: `<b>${escaped(r.model)}</b><br>${shown(r.value, view.x.percent, 5)} ` +
          `(${shown(r.low, view.x.percent, 5)} to ${shown(r.high, view.x.percent, 5)})` });
      });
      return { svg, height, points };
    },

    heat(view, state, width) {
      const rows = view.data, columns = Math.max(...rows.map((r) => r.length)), left = 44;
      const cell = (width - left - 12) / columns, tall = Math.max(14, Math.min(34, 420 / rows.length));
      const high = Math.max(...rows.flat().filter((v) => v !== null), 1e-9), height = 24 + tall * rows.length + 46;
      let svg = `<text x="0" y="12">${escaped(view.y.label)}</text>`;
      svg += `<text x="${(left + width) / 2}" y="${height - 8}" text-anchor="middle">${escaped(view.x.label)}</text>`;
      const points = [], every = Math.ceil(columns / Math.max(1, Math.floor((width - left) / 28)));
      rows.forEach((row, i) => {
        const top = 24 + tall * i;
        svg += `<text x="${left - 8}" y="${top + tall / 2 + 4}" text-anchor="end">${i}</text>`;
        row.forEach((v, j) => {
          const at = left + cell * j;
          svg += `<rect class="grid" x="${at}" y="${top}" width="${cell}" height="${tall}" fill="#2b83c4" fill-opacity="${v === null ? 0 : (0.06 + 0.9 * v / high).toFixed(3)}"></rect>`;
          if (cell > 46) svg += `<text class="name" x="${at + cell / 2}" y="${top + tall / 2 + 4}" text-anchor="middle">${v === null ? "none" : shown(v, view.shares, 3)}</text>`;
          points.push({ x: at + cell / 2, y: top + tall / 2, text: `layer ${i}, expert ${j}: ${v === null ? "no token" : shown(v, view.shares)}` });
        });
      });
      for (let j = 0; j < columns; j += every) svg += `<text x="${left + cell * (j + 0.5)}" y="${height - 28}" text-anchor="middle">${j}</text>`;
      return { svg, height, points };
    },
  };

  function start(figure) {
    const chart = DATA.charts[figure.dataset.chart];
    const state = { view: 0, off: new Set(), log: false, logChosen: false };
    const controls = document.createElement("div"), holder = document.createElement("div"), tip = document.createElement("div");
    controls.className = "controls"; tip.className = "tip"; tip.hidden = true;
    figure.append(controls, holder, tip);
    let drawn = { points: [] };

    function button(text, mark, pressed, act, plain) {
      const b = document.createElement("button");
      b.type = "button"; b.innerHTML = mark + escaped(text); b.className = plain ? "plain" : "";
      b.setAttribute("aria-pressed", pressed);
      b.onclick = () => { act(); draw(); };
      controls.append(b);
    }
    const toggle = (key) => () => (state.off.has(key) ? state.off.delete(key) : state.off.add(key));

    function draw() {
      const view = chart.views[state.view], lines = chart.kind === "lines";
      const ys = lines ? view.data.flatMap((s) => s.points.map((p) => p[1])) : [];
      const low = Math.min(...ys), high = Math.max(...ys);
      if (!state.logChosen) state.log = low > 0 && (view.y.scale === "log" || (view.y.scale === "auto" && high > 5 * low));
      controls.innerHTML = "";
      if (chart.views.length > 1) {
        const select = document.createElement("select");
        select.setAttribute("aria-label", "view");
        chart.views.forEach((v, i) => select.add(new Option(v.name, i, false, i === state.view)));
        select.onchange = () => { state.view = +select.value; draw(); };
        controls.append(select);
      }
      if (chart.kind !== "heat") for (const m of unique(view.data.map((s) => s.model)))
        button(m, `<svg width="12" height="12"><circle cx="6" cy="6" r="5" fill="${colour(m)}"></circle></svg>`, !state.off.has(m), toggle(m));
      if (lines) {
        unique(view.data.map((s) => s.style).filter(Boolean)).forEach((style, i) => {
          const dots = view.data.some((s) => s.style === style && s.mark === "dots");
          const thin = view.data.some((s) => s.style === style && s.mark === "thin");
          const mark = dots ? `<circle cx="12" cy="5" r="2.6" fill="currentColor"></circle>`
            : `<path d="M0 5H24" stroke="currentColor" stroke-width="${thin ? 1 : 2}" stroke-dasharray="${thin ? "" : DASHES[i % DASHES.length]}"></path>`;
          button(style, `<svg width="24" height="10">${mark}</svg>`, !state.off.has("." + style), toggle("." + style));
        });
        if (high > 0) button("log scale", "", state.log, () => { state.log = !state.log; state.logChosen = true; }, true);
        if (view.data.some((s) => s.mark === "ring")) {
          const ring = document.createElement("span");
          ring.innerHTML = `<svg width="14" height="14"><circle cx="7" cy="7" r="5.5" fill="none" stroke="currentColor" stroke-width="1.6"></circle></svg>as it is, nothing masked`;
          controls.append(ring);
        }
      }
      const width = Math.max(260, figure.clientWidth);
      drawn = KINDS[chart.kind](view, state, width);
      holder.innerHTML = `<svg width="${width}" height="${drawn.height}" role="img" aria-label="${escaped(chart.title)}">${drawn.svg}<circle class="hit" r="6" fill="none" stroke="currentColor" stroke-width="2" visibility="hidden"></circle></svg>`;
      tip.hidden = true;
    }

    holder.onpointermove = holder.onpointerdown = (event) => {
      const box = holder.getBoundingClientRect(), px = event.clientX - box.left, py = event.clientY - box.top;
      let best = null, least = 1600;
      for (const p of drawn.points) {
        const d = (p.x - px) ** 2 + (p.y - py) ** 2;
        if (d < least) { least = d; best = p; }
      }
      const hit = holder.querySelector(".hit");
      tip.hidden = !best;
      hit.setAttribute("visibility", best ? "visible" : "hidden");
      if (!best) return;
      hit.setAttribute("cx", best.x); hit.setAttribute("cy", best.y);
      tip.innerHTML = best.text;
      const left = Math.min(Math.max(0, best.x - tip.offsetWidth / 2), figure.clientWidth - tip.offsetWidth);
      tip.style.left = left + "px";
      tip.style.top = holder.offsetTop + best.y + (best.y > tip.offsetHeight + 16 ? -tip.offsetHeight - 12 : 14) + "px";
    };
    holder.onpointerleave = () => { tip.hidden = true; holder.querySelector(".hit").setAttribute("visibility", "hidden"); };
    let width = 0;
    new ResizeObserver(() => { if (figure.clientWidth !== width) { width = figure.clientWidth; draw(); } }).observe(figure);
    width = figure.clientWidth;
    draw();
  }

  /* Light or dark: as the system says until this is pressed. */
  function theme() {
    const b = document.createElement("button"), root = document.documentElement;
    const dark = () => getComputedStyle(root).colorScheme === "dark";
    const named = () => { b.textContent = dark() ? "light" : "dark"; b.setAttribute("aria-label", b.textContent + " colours"); };
    b.type = "button"; b.className = "theme";
    b.onclick = () => { root.dataset.theme = dark() ? "light" : "dark"; named(); };
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", named);
    named();
    document.querySelector("header").append(b);
  }

  theme();
  document.querySelectorAll("figure.chart").forEach(start);
  if (window.innerWidth < 560) document.querySelectorAll("details").forEach((d) => { d.open = false; });
})();
