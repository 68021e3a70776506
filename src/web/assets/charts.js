// Small charts as inline SVG: a point's sparkline, and a level over the last minutes. Drawn anew only when asked.

import { h, setAttribute, setText, svg } from './dom.js';

const SPARK = { width: 96, height: 28, inset: 3 };

// The course of a value. `update([[millis, number], …])`; a point that says yes and no is drawn in steps.
export function sparkline() {
  const line = svg('path', { class: 'spark-line' });
  const dot = svg('circle', { class: 'spark-dot', r: 2 });
  const element = svg('svg', {
    class: 'spark', viewBox: `0 0 ${SPARK.width} ${SPARK.height}`, 'aria-hidden': 'true', width: SPARK.width, height: SPARK.height,
  }, line, dot);
  return {
    element,
    update(all, isStep) {
      const history = sinceGap(all);
      element.classList.toggle('is-empty', history.length < 2);
      if (history.length < 2) return;
      const values = history.map(([, value]) => value);
      const [low, high] = [Math.min(...values), Math.max(...values)];
      const [start, end] = [history[0][0], history[history.length - 1][0]];
      const { width, height, inset } = SPARK;
      const x = (time) => inset + (width - 2 * inset) * (end > start ? (time - start) / (end - start) : 1);
      const y = (value) => (high > low ? height - inset - (height - 2 * inset) * ((value - low) / (high - low)) : height / 2);
      let path = '';
      history.forEach(([time, value], index) => {
        const [px, py] = [x(time).toFixed(1), y(value).toFixed(1)];
        path += index === 0 ? `M${px} ${py}` : isStep ? `H${px}V${py}` : `L${px} ${py}`;
      });
      setAttribute(line, 'd', path);
      setAttribute(dot, 'cx', x(end).toFixed(1));
      setAttribute(dot, 'cy', y(values[values.length - 1]).toFixed(1));
    },
  };
}

// The values since the last long silence: a line across it would claim what nobody measured.
function sinceGap(history) {
  const pauses = history.slice(1).map(([time], index) => time - history[index][0]);
  const usual = pauses.toSorted((one, other) => one - other)[Math.floor(pauses.length / 2)] ?? 0;
  const gap = pauses.findLastIndex((pause) => pause > Math.max(10 * usual, 5000));
  return gap < 0 ? history : history.slice(gap + 1);
}

const LEVEL = { width: 600, height: 120 };

// Widths of the time axis in seconds: a gateway that has just started has little to show.
const SPANS = [60, 120, 300];

// One or two series of one number a second over the last minutes, newest at the right.
export function levelChart({ label, unit, names = [] }) {
  const areas = [svg('path', { class: 'chart-area' }), svg('path', { class: 'chart-area second' })];
  const lines = [svg('path', { class: 'chart-line' }), svg('path', { class: 'chart-line second' })];
  const grid = [0.5, 1].map((part) => svg('path', {
    class: 'chart-grid', d: `M0 ${LEVEL.height * (1 - part) + 1}H${LEVEL.width}`,
  }));
  const base = svg('path', { class: 'chart-base', d: `M0 ${LEVEL.height - 0.5}H${LEVEL.width}` });
  const drawing = svg('svg', {
    viewBox: `0 0 ${LEVEL.width} ${LEVEL.height}`, preserveAspectRatio: 'none', 'aria-hidden': 'true',
  }, ...grid, ...areas, base, ...lines);
  const top = h('span', { class: 'chart-top' });
  const half = h('span', { class: 'chart-half' });
  const start = h('span', {}, '1 min ago');
  const summary = h('span', { class: 'sr-only' });
  const legend = names.length > 1
    && h('span', { class: 'chart-legend' }, ...names.map((name, index) => h('span', { class: index ? 'second' : '' }, name)));
  const element = h('figure', { class: 'chart' },
    h('figcaption', {}, h('span', {}, label), legend),
    h('div', { class: 'chart-plot' }, drawing, top, half),
    h('div', { class: 'chart-axis', 'aria-hidden': 'true' }, start, h('span', {}, 'now')),
    summary);
  return {
    element,
    update(...series) {
      const length = Math.max(...series.map((values) => values.length));
      const seconds = SPANS.find((span) => span >= length) ?? SPANS[SPANS.length - 1];
      setText(start, `${seconds / 60} min ago`);
      const high = niceCeiling(Math.max(0, ...series.flat()));
      series.forEach((values, index) => {
        const step = LEVEL.width / (seconds - 1);
        const first = LEVEL.width - (values.length - 1) * step;
        const y = (value) => (LEVEL.height - 1 - (LEVEL.height - 4) * (value / high)).toFixed(1);
        const points = values.map((value, at) => `${(first + at * step).toFixed(1)} ${y(value)}`);
        setAttribute(lines[index], 'd', points.length ? `M${points.join('L')}` : '');
        const area = points.length ? `M${first.toFixed(1)} ${LEVEL.height}L${points.join('L')}L${LEVEL.width} ${LEVEL.height}Z` : '';
        setAttribute(areas[index], 'd', area);
      });
      setText(top, high.toLocaleString('en'));
      setText(half, (high / 2).toLocaleString('en'));
      const now = series.map((values) => values[values.length - 1] ?? 0).join(' and ');
      setText(summary, `${label}: now ${now} ${unit}; scale up to ${high}.`);
    },
  };
}

// 10, 20, 50, 100, …: the scale changes seldom, so the drawing stays calm.
function niceCeiling(value) {
  if (value <= 10) return 10;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((factor) => factor * power).find((limit) => limit >= value);
}
