// Charts of a page, drawn with uPlot from the JSON that each <figure data-chart> names or holds. Tables below them hold some
// of the figures as text, and the marks.
const NUM_COLOURS = 10;
const GAP_PX = 4;
const MARGIN_PX = 30;
const TRIANGLE_PX = 8;
const MAX_POINTS = 4000;
const MINUTE_S = 60;
const DAY_S = 86_400;
const TIME_STEPS_S = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14_400, 21_600, 43_200, DAY_S, 7 * DAY_S, 30 * DAY_S];

const probe = document.body.appendChild(document.createElement("span"));
probe.hidden = true;
const drawn = new Map(); // figure -> { plot, data, isFetching, isStale }

// A colour of the theme, as the canvas understands it.
function css(name) {
  probe.style.color = `var(${name}, var(--muted))`;
  return getComputedStyle(probe).color;
}

function font(pixels) {
  return `${pixels}px ${getComputedStyle(document.body).fontFamily}`;
}

function number(value) {
  if (value == null) return "–";
  const digits = Math.abs(value) >= 100 ? 0 : Math.abs(value) >= 10 ? 1 : Math.abs(value) >= 0.1 ? 2 : 3;
  return value.toLocaleString("en", { maximumFractionDigits: digits });
}

function clock(seconds, step) {
  const time = new Date(seconds * 1000);
  if (step >= DAY_S) return time.toLocaleDateString("en-GB", { day: "numeric", month: "short", timeZone: "UTC" });
  const parts = { hour: "2-digit", minute: "2-digit", timeZone: "UTC" };
  if (step < MINUTE_S) parts.second = "2-digit";
  return time.toLocaleTimeString("en-GB", parts);
}

function elapsed(seconds) {
  return `${Math.floor(seconds / MINUTE_S)}:${String(Math.floor(seconds % MINUTE_S)).padStart(2, "0")}`;
}

// A number of an axis, with as many digits as its steps have.
function tick(value, step) {
  const digits = (String(Number(step.toPrecision(3))).split(".")[1] ?? "").length;
  return value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

function axes(data) {
  const label = data.elapsed ? elapsed : clock;
  const common = {
    stroke: css("--muted"),
    font: font(12),
    grid: { stroke: css("--grid"), width: 1 },
    ticks: { show: false },
  };
  return [
    { ...common, space: 80, size: 30, incrs: TIME_STEPS_S, values: (_, splits, __, ___, step) => splits.map((at) => label(at, step)) },
    { ...common, size: 56, values: (_, splits, __, ___, step) => splits.map((at) => tick(at, step)) },
  ];
}

function series(data) {
  const limits = new Set((data.bands ?? []).flatMap((band) => [band.low, band.high]));
  let num = 0;
  const lines = data.series.map((line, i) => {
    const isLimit = limits.has(i);
    const colour = isLimit ? css("--band-line") : css(`--series-${num++ % NUM_COLOURS}`);
    return {
      label: line.label,
      stroke: colour,
      width: isLimit ? 1 : 2,
      points: isLimit ? { show: false } : { size: 5, fill: colour },
      value: (_, value) => number(value),
    };
  });
  const time = (at) => (data.elapsed ? elapsed(at) : new Date(at * 1000).toISOString().slice(0, 19).replace("T", " "));
  return [{ label: data.elapsed ? "time" : "time (UTC)", value: (_, at) => (at == null ? "–" : time(at)) }, ...lines];
}

function importance(mark) {
  return { shift: 0, stable: 1, canary: 3 }[mark.kind] ?? 2;
}

function drawLine({ ctx, bbox }, x) {
  ctx.beginPath();
  ctx.moveTo(x, bbox.top);
  ctx.lineTo(x, bbox.top + bbox.height);
  ctx.stroke();
}

// A swap: a triangle on the time axis, without a label, because it follows a change of a version that has one.
function drawTriangle({ ctx, bbox }, x) {
  const [size, bottom] = [TRIANGLE_PX * devicePixelRatio, bbox.top + bbox.height];
  ctx.beginPath();
  ctx.moveTo(x - size / 2, bottom);
  ctx.lineTo(x, bottom - size);
  ctx.lineTo(x + size / 2, bottom);
  ctx.fill();
}

function drawLabel(plot, mark, x, taken) {
  const { ctx, bbox } = plot;
  const half = ctx.measureText(mark.label).width / 2;
  const gap = GAP_PX * devicePixelRatio;
  const [from, to] = [x - half - gap, x + half + gap];
  if (to > bbox.left + bbox.width + MARGIN_PX * devicePixelRatio || taken.some(([start, end]) => from < end && to > start)) return;
  ctx.fillText(mark.label, x, bbox.top - 2 * devicePixelRatio);
  taken.push([from, to]);
}

// Vertical lines where versions changed or the traffic shifted, and triangles where pods swapped. Labels are left out where they would overlap, those of mere candidates first.
function drawMarks(plot, marks) {
  const { ctx, bbox } = plot;
  const ratio = devicePixelRatio;
  const taken = [];
  ctx.save();
  ctx.lineWidth = ratio;
  ctx.font = font(11 * ratio);
  ctx.textBaseline = "bottom";
  ctx.textAlign = "center";
  for (const mark of marks.toSorted((one, other) => importance(one) - importance(other) || other.time - one.time)) {
    const x = plot.valToPos(mark.time, "x", true);
    if (x < bbox.left || x > bbox.left + bbox.width) continue;
    ctx.strokeStyle = ctx.fillStyle = css(`--mark-${mark.kind.replace(" ", "-")}`);
    if (mark.kind === "swap") {
      drawTriangle(plot, x);
      continue;
    }
    ctx.globalAlpha = mark.kind === "canary" ? 0.35 : 1;
    ctx.setLineDash(mark.kind === "shift" ? [] : [3 * ratio, 3 * ratio]);
    drawLine(plot, x);
    ctx.globalAlpha = 1;
    drawLabel(plot, mark, x, taken);
  }
  ctx.restore();
}

function drawZero(plot) {
  const { ctx, bbox } = plot;
  const y = plot.valToPos(0, "y", true);
  if (y < bbox.top || y > bbox.top + bbox.height) return;
  ctx.save();
  ctx.strokeStyle = css("--muted");
  ctx.lineWidth = devicePixelRatio;
  ctx.beginPath();
  ctx.moveTo(bbox.left, y);
  ctx.lineTo(bbox.left + bbox.width, y);
  ctx.stroke();
  ctx.restore();
}

function range(data) {
  return (_, low, high) => {
    if (low == null) return [0, 1];
    const [from, to] = data.zero ? [Math.min(low, 0), Math.max(high, 0)] : [low, high];
    const margin = (to - from || Math.abs(to) || 1) * 0.08;
    return [from - (data.zero && from === 0 ? 0 : margin), to + margin];
  };
}

function size(place) {
  return { width: Math.max(place.clientWidth, 200), height: innerWidth < 640 ? 190 : 240 };
}

function columns(data) {
  return [data.times, ...data.series.map((line) => line.values)];
}

// Without a cursor on the chart, its legend shows the last values.
function showLast(plot) {
  if (plot.cursor.left >= 0) return;
  const idx = plot.data[0].findLastIndex((_, i) => plot.data.slice(1).some((values) => values[i] != null));
  plot.setLegend({ idx }, false);
}

function describe(place, data) {
  const last = data.series.map((line) => `${line.label} ${number(line.values.findLast((value) => value != null))}`);
  place.setAttribute("role", "img");
  place.setAttribute("aria-label", `${data.title}, ${data.unit}. Last values: ${last.join(", ")}.`);
}

function draw(figure, entry) {
  const place = figure.querySelector(".chart-plot");
  entry.plot?.destroy();
  entry.plot = null;
  const { data } = entry;
  place.textContent = "";
  if (!data.series.some((line) => line.values.some((value) => value != null))) {
    place.removeAttribute("role");
    place.removeAttribute("aria-label");
    const empty = place.appendChild(document.createElement("p"));
    empty.className = "quiet";
    empty.textContent = "No figures yet.";
    return;
  }
  const options = {
    ...size(place),
    series: series(data),
    axes: axes(data),
    tzDate: (at) => uPlot.tzDate(new Date(at * 1000), "Etc/UTC"), // as all other times of the pages
    scales: { x: { time: !data.elapsed }, y: { range: range(data) } },
    bands: (data.bands ?? []).map((band) => ({ series: [band.high + 1, band.low + 1], fill: css("--band") })),
    hooks: { draw: [(plot) => drawMarks(plot, entry.data.marks ?? []), ...(data.zero ? [drawZero] : [])], setLegend: [showLast] },
    padding: [20, 32, 0, 0],
    legend: { markers: { width: 0, fill: (plot, i) => plot.series[i].stroke(plot, i) } },
    cursor: { drag: { x: true, y: false }, points: { size: 7 } },
  };
  entry.plot = new uPlot(options, columns(data), place);
  showLast(entry.plot);
  describe(place, data);
}

// The old points with the newer ones, if both are of the same lines.
function joined(entry, newer) {
  const key = (one) => JSON.stringify([one.unit, one.zero, one.bands, one.series.map((line) => line.label)]);
  if (key(entry.data) !== key(newer)) return null;
  const numOld = newer.start == null ? 0 : entry.data.times.filter((at) => at <= newer.start).length;
  const join = (old, more) => old.slice(numOld).concat(more).slice(-MAX_POINTS);
  return {
    ...newer,
    times: join(entry.data.times, newer.times),
    series: newer.series.map((line, i) => ({ ...line, values: join(entry.data.series[i].values, line.values) })),
  };
}

async function load(figure, since) {
  const frozen = figure.querySelector("script[type='application/json']");
  if (frozen) return JSON.parse(frozen.textContent); // a page without a server, such as a report
  const response = await fetch(figure.dataset.chart + (since == null ? "" : `?since=${since}`), { credentials: "same-origin" });
  return response.ok ? response.json() : null; // the notice of the page says why
}

async function follow(figure, entry) {
  const newer = entry.plot ? await load(figure, entry.data.times.at(-1)) : null;
  const data = newer && joined(entry, newer);
  if (data) {
    entry.data = data;
    entry.plot.setData(columns(data));
    showLast(entry.plot);
    describe(figure.querySelector(".chart-plot"), data);
  } else {
    entry.data = (await load(figure)) ?? entry.data;
    if (entry.data) draw(figure, entry);
  }
}

async function refresh(figure) {
  const entry = drawn.get(figure);
  entry.isStale = true;
  if (entry.isFetching) return; // it looks again when it has what it waits for
  entry.isFetching = true;
  try {
    while (entry.isStale) {
      entry.isStale = false;
      await follow(figure, entry);
    }
  } catch (error) {
    if (!(error instanceof TypeError)) throw error; // the server is away; the stream reconnects, and its events come here
  } finally {
    entry.isFetching = false;
  }
}

const sizes = new ResizeObserver((entries) => {
  for (const { target } of entries) {
    const plot = drawn.get(target.closest("figure"))?.plot;
    const wanted = size(target);
    if (plot && plot.width !== wanted.width) requestAnimationFrame(() => plot.setSize(wanted));
  }
});

// Draw all charts, again with the colours of the theme if they are there already.
export function drawAll() {
  if (typeof uPlot === "undefined") return; // the wheel was built without it; the tables stay
  for (const figure of document.querySelectorAll("figure[data-chart]")) {
    const entry = drawn.get(figure);
    if (entry?.data) {
      draw(figure, entry);
    } else if (!entry) {
      drawn.set(figure, { plot: null, data: null, isFetching: false, isStale: false });
      sizes.observe(figure.querySelector(".chart-plot"));
      refresh(figure);
    }
  }
}

// Fetch the figures of all charts again.
export function refreshAll() {
  for (const figure of drawn.keys()) refresh(figure);
}
