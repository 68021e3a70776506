// Making elements, icons, and numbers and times as people read them. Knows nothing of the gateway.

const SVG = 'http://www.w3.org/2000/svg';

// h('p', {class: 'x', onclick: f}, 'text', child): an element. False, null and undefined are left out.
export function h(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value === null || value === undefined) continue;
    if (name.startsWith('on')) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? '' : value);
  }
  element.append(...children.flat().filter((child) => child !== false && child !== null && child !== undefined));
  return element;
}

// Touches the page only where something changed, so that selections and screen readers are left alone.
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

// As `setText`, with what stands between backticks set as code.
export function setProse(element, text) {
  const parts = text.split('`');
  if (parts.length % 2 === 0) setText(element, text);
  else if (element.textContent !== parts.join('')) {
    element.replaceChildren(...parts.map((part, index) => index % 2 ? h('code', {}, part) : part));
  }
}

export function setAttribute(element, name, value) {
  if (value === null || value === false) element.removeAttribute(name);
  else if (element.getAttribute(name) !== String(value)) element.setAttribute(name, value);
}

// Makes `parent` hold exactly `children`, moving as little as possible.
export function arrange(parent, children) {
  children.forEach((child, index) => {
    if (parent.children[index] !== child) parent.insertBefore(child, parent.children[index] ?? null);
  });
  while (parent.children.length > children.length) parent.lastElementChild.remove();
}

const ICONS = {
  overview: 'M3 3h6v7H3zM11 3h6v4h-6zM11 10h6v7h-6zM3 13h6v4H3z',
  devices: 'M6 6h8v8H6zM8.5 3v3M11.5 3v3M8.5 14v3M11.5 14v3M3 8.5h3M3 11.5h3M14 8.5h3M14 11.5h3',
  broker: 'M10 7.5a2.5 2.5 0 1 0 0 5 2.5 2.5 0 0 0 0-5zM4 3.5v.01M16 3.5v.01M4 16.5v.01M16 16.5v.01M4.5 4.2l3.6 3.9M15.5 4.2l-3.6 3.9M4.5 15.8l3.6-3.9M15.5 15.8l-3.6-3.9',
  log: 'M4 5h12M4 10h12M4 15h7',
  good: 'M10 2.5a7.5 7.5 0 1 0 0 15 7.5 7.5 0 0 0 0-15zM6.7 10.2l2.3 2.3 4.4-4.7',
  degraded: 'M10 3 2.3 16.5h15.4zM10 8v4M10 14.2v.01',
  down: 'M7 2.5h6L17.5 7v6L13 17.5H7L2.5 13V7zM7.5 7.5l5 5M12.5 7.5l-5 5',
  paused: 'M10 2.5a7.5 7.5 0 1 0 0 15 7.5 7.5 0 0 0 0-15zM8.2 7.3v5.4M11.8 7.3v5.4',
  starting: 'M10 2.5a7.5 7.5 0 1 0 0 15 7.5 7.5 0 0 0 0-15zM10 6v4.2l2.7 1.6',
  cloud: 'M6 15.5a3.5 3.5 0 0 1-.5-6.96A5 5 0 0 1 15.2 9.6 3 3 0 0 1 14.5 15.5z',
  cut: 'M8.5 11.5 4.8 15.2M11.5 8.5l3.7-3.7M3 7.5h3M7.5 3v3M17 12.5h-3M12.5 17v-3',
  link: 'M8.3 11.7 11.7 8.3M9 6.2l1.8-1.8a3.4 3.4 0 0 1 4.8 4.8L13.8 11M11 13.8l-1.8 1.8a3.4 3.4 0 0 1-4.8-4.8L6.2 9',
  leave: 'M8 3.5H4v13h4M12.5 6.5 16 10l-3.5 3.5M8 10h8',
  info: 'M10 2.5a7.5 7.5 0 1 0 0 15 7.5 7.5 0 0 0 0-15zM10 9v4.5M10 6.5v.01',
  hold: 'M7.5 4.5v11M12.5 4.5v11',
  play: 'M6.5 4v12l9-6z',
  down_arrow: 'M10 4v12M5 11l5 5 5-5',
};

// A decorative icon; what it means always stands beside it as text.
export function icon(name) {
  const path = svg('path', { d: ICONS[name] ?? ICONS.info });
  return svg('svg', { class: 'icon', viewBox: '0 0 20 20', 'aria-hidden': 'true' }, path);
}

export function setIcon(element, name) {
  const path = element.firstElementChild;
  if (path.getAttribute('d') !== ICONS[name]) path.setAttribute('d', ICONS[name] ?? ICONS.info);
}

// The mark: three lines of the field come together and go on as one, through a gate.
export function mark() {
  const path = 'M5 8h3l7 8M5 24h3l7-8M5 16h22M20 5v6M20 21v6';
  return svg('svg', { class: 'mark', viewBox: '0 0 32 32', 'aria-hidden': 'true' }, svg('path', { d: path }));
}

const HEALTH = {
  good: 'Good', degraded: 'Needs attention', down: 'Down', paused: 'Not connected', starting: 'Starting', unknown: 'Unknown',
};

export const healthWord = (health) => HEALTH[health] ?? health;

// Icon and word of a health; `update(health)` changes it in place.
export function healthBadge(health = 'starting', word = healthWord) {
  const mark = icon(health);
  const text = h('span', {}, word(health));
  const element = h('span', { class: 'badge', 'data-health': health }, mark, text);
  return {
    element,
    update(health) {
      setAttribute(element, 'data-health', health);
      setIcon(mark, health);
      setText(text, word(health));
    },
  };
}

export function emptyState(title, text, yaml) {
  return h('div', { class: 'empty' }, h('h3', {}, title), h('p', {}, text), yaml && h('pre', {}, h('code', {}, yaml)));
}

// Begins with a capital, unless it begins with a name, an address or a path, which are as they are.
export function sentence(text) {
  return /^[a-z]+(?![^\s,;])/.test(text) ? `${text.charAt(0).toUpperCase()}${text.slice(1)}` : text;
}

// What went wrong, and what to do about it.
export function explain({ message, hint }) {
  return [h('strong', {}, ...code(`${sentence(message)}.`)), ' ', ...code(hint)];
}

// Text in which `words like these` are code.
function code(text) {
  return text.split('`').map((part, index) => (index % 2 ? h('code', {}, part) : part));
}

// 1,234 and 12.35: as many decimals as asked for.
export function number(value, decimals = 0) {
  return value.toLocaleString('en', { minimumFractionDigits: decimals, maximumFractionDigits: decimals });
}

// 0.4, 12.3, 1,234: a rate a person can compare at a glance.
export function rate(value) {
  return number(value, value > 0 && value < 100 ? 1 : 0);
}

export function bytes(value) {
  if (value < 1024) return `${value} B`;
  const units = ['KiB', 'MiB', 'GiB', 'TiB'];
  let unit = -1;
  do { value /= 1024; unit += 1; } while (value >= 1024 && unit < units.length - 1);
  return `${number(value, value < 10 ? 1 : 0)} ${units[unit]}`;
}

export function plural(count, one, many = `${one}s`) {
  return `${number(count)} ${count === 1 ? one : many}`;
}

// 45 s, 12 min, 3 h 20 min, 4 d 3 h.
export function duration(seconds) {
  seconds = Math.max(0, Math.floor(seconds));
  if (seconds < 60) return `${seconds} s`;
  const minutes = Math.floor(seconds / 60);
  if (minutes < 60) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  if (hours < 24) return minutes % 60 ? `${hours} h ${minutes % 60} min` : `${hours} h`;
  const days = Math.floor(hours / 24);
  return hours % 24 ? `${number(days)} d ${hours % 24} h` : `${number(days)} d`;
}

export function age(seconds) {
  return seconds < 1.5 ? 'now' : `${duration(seconds)} ago`;
}

const CLOCK = new Intl.DateTimeFormat('en-GB', { hour: '2-digit', minute: '2-digit', second: '2-digit' });
const DAY = new Intl.DateTimeFormat('en-GB', { day: 'numeric', month: 'short', hour: '2-digit', minute: '2-digit' });

// The time of day, in the browser's zone.
export const clock = (millis) => CLOCK.format(millis);

// With the date, where it is not today.
export function moment(millis) {
  const isToday = new Date(millis).toDateString() === new Date().toDateString();
  return (isToday ? CLOCK : DAY).format(millis);
}
