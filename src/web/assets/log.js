// The last log lines, live, newest at the bottom.

import { clock, emptyState, h, icon, moment, setIcon, setText } from './dom.js';
import { on, state } from './store.js';

const LEVELS = ['error', 'warn', 'info', 'debug'];
const WORDS = { error: 'Error', warn: 'Warning', info: 'Info', debug: 'Debug' };
const MAX_ROWS = 1000;

// What the reader chose stays while the page is open.
const choice = { level: 'info', word: '' };

export function log(root) {
  let held = false;
  const lines = h('ol', { class: 'lines' });
  const scroller = h('div', { class: 'panel log', tabindex: '0', role: 'region', 'aria-label': 'Log lines' }, lines);
  const empty = emptyState('No lines of this kind', 'Choose a lower level above, or write more with “log: { level: debug }” in the configuration file.');
  const levels = h('fieldset', { class: 'segments' }, h('legend', { class: 'sr-only' }, 'Show lines of this level and graver'),
    ...LEVELS.map((level) => h('label', {},
      h('input', { type: 'radio', name: 'level', value: level, checked: level === choice.level, onchange: () => { choice.level = level; showAll(); } }),
      h('span', {}, WORDS[level]))));
  const filter = h('input', { id: 'log-filter', type: 'search', placeholder: 'Words', value: choice.word, autocomplete: 'off' });
  filter.addEventListener('input', () => { choice.word = filter.value.trim().toLowerCase(); showAll(); });
  const mark = icon('hold');
  const label = h('span', {}, 'Hold');
  const hold = h('button', { type: 'button', 'aria-pressed': 'false' }, mark, label);
  const newest = h('button', { type: 'button', class: 'newest', hidden: true }, icon('down_arrow'), h('span', {}, 'Newest'));
  hold.addEventListener('click', () => {
    held = !held;
    hold.setAttribute('aria-pressed', held);
    setIcon(mark, held ? 'play' : 'hold');
    setText(label, held ? 'Go on' : 'Hold');
    if (!held) showAll();
  });
  newest.addEventListener('click', toBottom);
  scroller.addEventListener('scroll', () => { newest.hidden = isAtBottom(); }, { passive: true });
  root.append(
    h('div', { class: 'heading' }, h('h1', {}, 'Log'),
      h('div', { class: 'tools' }, levels, h('label', { class: 'sr-only', for: 'log-filter' }, 'Show only lines with'), filter, hold)),
    h('div', { class: 'log-frame' }, scroller, newest), empty);

  const isWanted = (line) => LEVELS.indexOf(line.level) <= LEVELS.indexOf(choice.level)
    && (!choice.word || text(line).toLowerCase().includes(choice.word));
  function isAtBottom() {
    return scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 24;
  }
  function toBottom() {
    scroller.scrollTop = scroller.scrollHeight;
    newest.hidden = true;
  }
  function showAll() {
    lines.replaceChildren(...state.log.filter(isWanted).map(row));
    finish(true);
  }
  function finish(follow) {
    while (lines.children.length > MAX_ROWS) lines.firstElementChild.remove();
    const none = lines.children.length === 0;
    scroller.hidden = none;
    empty.hidden = !none;
    if (follow) toBottom();
  }
  showAll();
  return on('log', (fresh) => {
    if (held) return;
    if (fresh === null) return showAll();
    const follow = scroller.hidden || isAtBottom();
    lines.append(...fresh.filter(isWanted).map(row));
    finish(follow);
  });
}

function text(line) {
  return `${line.level} ${line.target} ${line.message} ${line.fields.map(([name, value]) => `${name}=${value}`).join(' ')}`;
}

function row(line) {
  const time = Date.parse(line.time);
  const target = line.target.replace(/^fieldgate::/, '');
  return h('li', { 'data-level': line.level },
    h('time', { datetime: line.time, title: moment(time) }, clock(time)),
    h('span', { class: 'level' }, WORDS[line.level] ?? line.level),
    h('span', { class: 'target', title: line.target }, target),
    h('span', { class: 'message' }, line.message,
      ...line.fields.map(([name, value]) => h('span', { class: 'field' }, h('span', {}, `${name}=`), value))));
}
