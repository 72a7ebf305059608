// Copyright (c) the ConvNeXt V2 toolkit authors.
// Licensed under the MIT License; see LICENSE.
// Draws the curves of a report. All texts are set as text, never as HTML.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const hiddenRuns = new Set();
const charts = [];
const MOST_ROWS = 14; // of the values at a point
const MARKED = 24; // points up to which a curve has marks: between them nothing was measured
let smoothing = 0;

// The first and the last epoch of each run, in all charts.
const spans = data.runs.map((_, run) => {
  const charts = data.charts.filter((chart) => chart.axis === "epoch");
  const series = charts.flatMap((chart) => chart.series).filter((each) => each.run === run);
  return [Math.min(...series.map((each) => each.x[0])), Math.max(...series.map((each) => each.x.at(-1)))];
});

const SVG = "http://www.w3.org/2000/svg";
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const range = (count) => Array.from({ length: count }, (_, i) => i);

function element(name, attributes = {}, text = "") {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== "") made.textContent = text;
  return made;
}

function html(name, text = "", kind = "") {
  const made = document.createElement(name);
  if (text !== "") made.textContent = text;
  if (kind) made.className = kind;
  return made;
}

function format(value, digits = 4) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-4) {
    return value.toExponential(digits - 2).replace(/(\.\d*?)0+e/, "$1e").replace(".e", "e");
  }
  if (size >= 1000) {
    const whole = Math.floor(Math.log10(size)) + 1;
    return value.toLocaleString("en", { maximumFractionDigits: Math.max(digits - whole, 0) });
  }
  return String(Number(value.toPrecision(digits)));
}

// Texts of the marks of an axis, with as many digits as it takes to tell them apart.
function formatMarks(marks) {
  for (let digits = 4; digits < 15; digits++) {
    const texts = marks.map((mark) => format(mark, digits));
    if (new Set(texts).size === texts.length) return texts;
  }
  return marks.map(String);
}

// The exponential moving average of TensorBoard, without its pull towards zero at the start.
function smooth(values, weight) {
  if (!weight) return values;
  let mean = 0;
  let total = 0;
  return values.map((value) => {
    mean = weight * mean + (1 - weight) * value;
    total = weight * total + (1 - weight);
    return mean / total;
  });
}

// About `count` round numbers from low to high, `least` or more from each other.
function ticks(low, high, count, least = 0) {
  const rough = Math.max((high - low) / count, least);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((each) => each * power >= rough * 0.999);
  const first = Math.ceil(low / step - 1e-9);
  const last = Math.floor(high / step + 1e-9);
  return range(Math.min(last - first + 1, 50)).map((i) => Number(((first + i) * step).toPrecision(12)));
}

// Powers of ten from low to high, with 2 and 5 between them where they are few.
function logTicks(low, high) {
  const first = Math.floor(Math.log10(low));
  const last = Math.ceil(Math.log10(high));
  const every = Math.max(1, Math.ceil((last - first) / 6));
  const factors = last - first <= 1 ? [1, 1.5, 2, 3, 4, 5, 7] : last - first <= 3 ? [1, 2, 5] : [1];
  const found = [];
  for (let power = first; power <= last; power += every) {
    for (const factor of factors) found.push(factor * 10 ** power);
  }
  return found.filter((value) => value >= low * 0.999 && value <= high * 1.001);
}

class Chart {
  constructor(figure, spec) {
    this.figure = figure;
    this.spec = spec;
    this.log = spec.log;
    this.hidden = new Set();
    this.cursor = null;
    this.plot = figure.querySelector(".plot");
    this.plot.tabIndex = 0;
    this.plot.setAttribute("role", "group");
    this.plot.setAttribute("aria-label", `${spec.title}: the arrow keys read its values`);
    this.buttons = all("button[data-series]", figure);
    this.series = spec.series.map((series, index) => ({
      ...series,
      name: this.buttons[index].textContent,
      style: this.buttons[index].dataset.style, // color and dash, as classes
    }));
    this.positive = this.series.some((series) => series.y.some((y) => y > 0));
    this.logButton = figure.querySelector("button.log");
    this.logButton.hidden = !this.positive;
    this.logButton.addEventListener("click", () => this.setLog(!this.log));
    this.buttons.forEach((button, index) => {
      button.addEventListener("click", () => this.toggle(index));
    });
    this.tip = html("div", "", "tip");
    this.tip.setAttribute("role", "status");
    this.tip.hidden = true;
    this.listen();
    this.setLog(this.log);
  }

  listen() {
    this.plot.addEventListener("pointermove", (event) => this.point(event));
    this.plot.addEventListener("pointerdown", (event) => this.point(event));
    this.plot.addEventListener("pointerleave", () => this.moveTo(null));
    this.plot.addEventListener("blur", () => this.moveTo(null));
    this.plot.addEventListener("keydown", (event) => {
      const xs = this.xs();
      const here = xs.indexOf(this.cursor);
      const steps = { ArrowLeft: here < 0 ? xs.length - 1 : here - 1, ArrowRight: here + 1 };
      Object.assign(steps, { Home: 0, End: xs.length - 1 });
      if (event.key === "Escape") this.moveTo(null);
      if (!(event.key in steps) || !xs.length) return;
      event.preventDefault();
      this.moveTo(xs[Math.max(0, Math.min(xs.length - 1, steps[event.key]))]);
    });
    new ResizeObserver(() => this.draw()).observe(this.plot);
  }

  setLog(log) {
    this.log = log && this.positive;
    this.logButton.setAttribute("aria-pressed", String(this.log));
    this.draw();
  }

  toggle(index) {
    if (!this.hidden.delete(index)) this.hidden.add(index);
    this.buttons[index].setAttribute("aria-pressed", String(!this.hidden.has(index)));
    this.draw();
  }

  // The curves to draw, with smoothed values; a log axis has no place for values up to zero.
  shown() {
    return this.series
      .filter((series, index) => !hiddenRuns.has(series.run) && !this.hidden.has(index))
      .map((series) => {
        const smoothed = smooth(series.y, smoothing);
        const kept = range(series.y.length).filter((i) => !this.log || series.y[i] > 0);
        return {
          ...series,
          x: kept.map((i) => series.x[i]),
          y: kept.map((i) => smoothed[i]),
          raw: kept.map((i) => series.y[i]),
        };
      })
      .filter((series) => series.x.length && series.y.every((y) => !this.log || y > 0));
  }

  xs() {
    return [...new Set(this.shown().flatMap((series) => series.x))].sort((a, b) => a - b);
  }

  // Scales from values to pixels for the curves that are shown.
  measure(shown) {
    const width = Math.max(this.plot.clientWidth, 120);
    const height = Math.max(this.plot.clientHeight, 80);
    // Charts that show the same runs have the same epochs.
    const ofEpochs = this.spec.axis === "epoch";
    const xs = shown.flatMap((series) => (ofEpochs ? spans[series.run] : series.x));
    const ys = shown.flatMap((series) => series.raw.concat(series.y));
    let [left, right] = [Math.min(...xs), Math.max(...xs)];
    let [low, high] = [Math.min(...ys), Math.max(...ys)];
    if (left === right) [left, right] = [left - 1, right + 1];
    if (this.log) {
      if (low === high) [low, high] = [low / 2, high * 2];
      [low, high] = [low / 1.08, high * 1.08];
    } else {
      const pad = low === high ? Math.abs(low) * 0.1 || 1 : (high - low) * 0.06;
      const floor = low >= 0 ? 0 : -Infinity;
      const ceiling = high > 80 && high <= 100 ? 100 : Infinity; // of a rate
      [low, high] = [Math.max(low - pad, floor), Math.min(high + pad, ceiling)];
    }
    const marks = this.log ? logTicks(low, high) : ticks(low, high, 5);
    const texts = formatMarks(marks);
    const widest = Math.max(...texts.map((text) => text.length), 1);
    const box = { left: 12 + widest * 6.6, right: width - 10, top: 8, bottom: height - 24 };
    const depth = (y) => (this.log ? Math.log(y / low) / Math.log(high / low) : (y - low) / (high - low));
    return {
      width, height, box, marks, texts, left, right,
      x: (x) => box.left + ((x - left) / (right - left)) * (box.right - box.left),
      y: (y) => box.bottom - depth(y) * (box.bottom - box.top),
    };
  }

  draw() {
    const shown = this.shown();
    const svg = element("svg", { role: "img" });
    svg.append(element("title", {}, this.describe(shown)));
    this.scale = shown.length ? this.measure(shown) : null;
    if (this.scale) {
      this.drawAxes(svg);
      for (const series of shown) this.drawCurve(svg, series);
    } else {
      svg.append(element("text", { x: 12, y: 24 }, "no curve to show"));
    }
    this.marker = element("g");
    svg.append(this.marker);
    this.plot.replaceChildren(svg, this.tip);
    this.moveTo(this.cursor);
  }

  describe(shown) {
    const values = shown.map((series) => `${series.name} ${format(series.raw.at(-1))}`);
    return `${this.spec.title}${this.log ? ", log axis" : ""}; last values: ${values.join(", ")}`;
  }

  drawAxes(svg) {
    const { width, height, box, marks, texts, left, right, x, y } = this.scale;
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    for (const [i, mark] of marks.entries()) {
      const line = { x1: box.left, x2: box.right, y1: y(mark), y2: y(mark), class: "gridline" };
      svg.append(element("line", line));
      const place = { x: box.left - 7, y: y(mark) + 4, "text-anchor": "end", class: "y" };
      svg.append(element("text", place, texts[i]));
    }
    const count = Math.max(2, Math.floor((width - 50) / 75)); // the same in all charts of this width
    const whole = this.xs().every(Number.isInteger) ? 1 : 0;
    for (const mark of ticks(left, right, count, whole)) {
      const place = { x: x(mark), y: height - 6, "text-anchor": "middle", class: "x" };
      svg.append(element("text", place, format(mark)));
    }
    const base = { x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom, class: "axis" };
    svg.append(element("line", base));
  }

  drawCurve(svg, series) {
    const { x, y } = this.scale;
    const path = (ys) => ys.map((value, i) =>
      `${i ? "L" : "M"}${x(series.x[i]).toFixed(1)} ${y(value).toFixed(1)}`).join("");
    const kind = `curve ${series.style}`;
    if (smoothing) svg.append(element("path", { d: path(series.raw), class: `${kind} raw` }));
    const curve = element("path", { d: path(series.y), class: kind });
    curve.dataset.run = series.run;
    svg.append(curve);
    if (series.x.length > MARKED) return;
    const radius = series.x.length === 1 ? 3.5 : 3;
    for (const [i, at] of series.x.entries()) {
      const mark = { cx: x(at), cy: y(series.raw[i]), r: radius, class: series.style };
      svg.append(element("circle", mark));
    }
  }

  point(event) {
    const xs = this.xs();
    if (!xs.length) return;
    const at = event.clientX - this.plot.getBoundingClientRect().left;
    const far = (x) => Math.abs(this.scale.x(x) - at);
    this.moveTo(xs.reduce((best, x) => (far(x) < far(best) ? x : best)));
  }

  // Show the values at x, the number of epochs done; null hides them.
  moveTo(x) {
    this.cursor = x;
    this.marker.replaceChildren();
    this.tip.hidden = x === null || !this.scale;
    if (this.tip.hidden) return;
    const at = this.scale.x(x);
    const { top, bottom } = this.scale.box;
    this.marker.append(element("line", { x1: at, x2: at, y1: top, y2: bottom, class: "cursor" }));
    this.tip.replaceChildren(html("b", `${this.spec.axis} ${format(x)}`));
    const rows = this.shown()
      .map((series) => ({ series, i: series.x.indexOf(x) }))
      .filter((row) => row.i >= 0);
    for (const [place, { series, i }] of rows.entries()) {
      const spot = { cx: at, cy: this.scale.y(series.y[i]), r: 4, class: `dot ${series.style}` };
      this.marker.append(element("circle", spot));
      if (place >= MOST_ROWS) continue;
      const swatch = element("svg", { width: 30, height: 12, class: "swatch" });
      const line = { x1: 1, x2: 29, y1: 6, y2: 6, class: series.style };
      swatch.append(element("line", line));
      const row = html("div");
      const smoothed = smoothing ? `${format(series.y[i])} (${format(series.raw[i])})` : format(series.raw[i]);
      row.append(swatch, html("span", series.name), html("span", smoothed));
      this.tip.append(row);
    }
    const left = rows.length - MOST_ROWS;
    if (left > 0) this.tip.append(html("b", `and ${left} more, in the table below`));
    const space = this.scale.width - at;
    const onLeft = space < this.tip.offsetWidth + 14;
    const place = onLeft ? at - this.tip.offsetWidth - 12 : at + 12;
    this.tip.style.left = `${Math.max(0, Math.min(place, this.scale.width - this.tip.offsetWidth))}px`;
  }
}

function toggleRun(button) {
  const run = Number(button.dataset.run);
  if (!hiddenRuns.delete(run)) hiddenRuns.add(run);
  button.setAttribute("aria-pressed", String(!hiddenRuns.has(run)));
  for (const chart of charts) chart.draw();
}

function listenToToolbar() {
  const slider = document.getElementById("smoothing");
  const log = document.getElementById("log");
  if (!slider || !log) return;
  slider.addEventListener("input", () => {
    smoothing = Number(slider.value);
    document.getElementById("smoothing-value").textContent = slider.value;
    for (const chart of charts) chart.draw();
  });
  log.addEventListener("click", () => {
    const on = log.getAttribute("aria-pressed") !== "true";
    log.setAttribute("aria-pressed", String(on));
    for (const chart of charts) chart.setLog(on);
  });
  for (const chip of all(".chip")) chip.addEventListener("click", () => toggleRun(chip));
}

function listenToAlbum(album) {
  const buttons = all("button[data-epoch]", album);
  for (const button of buttons) {
    button.addEventListener("click", () => {
      for (const each of buttons) each.setAttribute("aria-pressed", String(each === button));
      for (const image of all("img", album)) {
        image.hidden = image.dataset.epoch !== button.dataset.epoch;
      }
    });
  }
}

// Links to sections that this report lacks are not shown.
for (const link of all("nav a")) {
  link.hidden = !document.getElementById(link.getAttribute("href").slice(1));
}
for (const figure of all(".chart")) {
  charts.push(new Chart(figure, data.charts[Number(figure.dataset.chart)]));
}
listenToToolbar();
for (const album of all(".album")) listenToAlbum(album);
