// Devices and adapters: how each is, why, since when; and a way to set a point.

import { age, arrange, emptyState, explain, h, healthBadge, sentence, setProse, setText } from './dom.js';
import { show, showFacts } from './overview.js';
import { now, on, request, state } from './store.js';

export function devices(root) {
  const deviceTable = table('device', 'Devices', ['Device', 'Adapter', 'Health', 'Details', 'Since']);
  const adapterTable = table('adapter', 'Adapters', ['Adapter', '', 'Health', 'Details', 'Since']);
  root.append(h('h1', {}, 'Devices'), deviceTable.element, setPoint().element, adapterTable.element);
  const update = () => {
    if (!state.status) return;
    deviceTable.update();
    adapterTable.update();
  };
  update();
  return on('status', update);
}

const EMPTY = {
  device: () => emptyState('No devices are configured',
    'Devices hang on a bus or a port: add them under “modbus”, “serial” or “plugins” in the configuration file and reload. '
    + 'MQTT clients and sensors need no entry; they are in the broker view.',
    'serial:\n  - name: scale\n    path: /dev/ttyUSB0\n    baud_rate: 9600\n    parse: { regex: "(?<weight>[0-9.]+) kg" }'),
  adapter: () => emptyState('No adapters run', 'Each bus under “modbus”, each port under “serial” and each program under “plugins” becomes one.'),
};

function table(kind, title, columns) {
  const body = h('tbody');
  const rows = new Map();
  const empty = EMPTY[kind]();
  const head = h('thead', {}, h('tr', {}, ...columns.map((column) => h('th', { scope: 'col' }, column || h('span', { class: 'sr-only' }, 'Belongs to')))));
  const whole = h('div', { class: 'panel' }, h('table', { class: 'cards' }, head, body));
  const element = h('section', { 'aria-label': title }, kind === 'adapter' && h('h2', {}, title), whole, empty);
  return {
    element,
    update() {
      const all = state.status.components.filter((component) => component.kind === kind);
      whole.hidden = all.length === 0;
      empty.hidden = all.length > 0;
      for (const component of all) {
        if (!rows.has(component.name)) rows.set(component.name, row(columns));
        rows.get(component.name).update(component);
      }
      arrange(body, all.map(({ name }) => rows.get(name).element));
    },
  };
}

function row(columns) {
  const name = h('strong', { class: 'nowrap' });
  const parent = h('span', { class: 'nowrap' });
  const badge = healthBadge();
  const reason = h('p', { class: 'reason' });
  const facts = h('dl', { class: 'facts' });
  const since = h('span', { class: 'nowrap' });
  const cells = [name, parent, badge.element, [reason, facts], since];
  const element = h('tr', {}, ...cells.map((cell, index) => h('td', { 'data-label': columns[index] }, h('div', {}, cell))));
  return {
    element,
    update(component) {
      setText(name, component.name);
      setText(parent, component.parent ?? '');
      badge.update(component.health);
      setProse(reason, sentence(component.reason ?? ''));
      showFacts(facts, component.facts);
      setText(since, age((now() - Date.parse(component.since)) / 1000));
    },
  };
}

// A command by hand. Which points take one only the adapter knows; it answers in words.
function setPoint() {
  const device = h('select', { id: 'set-device', required: true });
  const point = h('input', { id: 'set-point', list: 'set-points', required: true, autocomplete: 'off', spellcheck: 'false' });
  const points = h('datalist', { id: 'set-points' });
  const value = h('input', { id: 'set-value', required: true, autocomplete: 'off', placeholder: '21.5, true or text' });
  const button = h('button', { type: 'submit' }, 'Set');
  const outcome = h('p', { class: 'outcome', role: 'status' });
  const offerPoints = () => {
    const known = [...state.values.values()].filter(({ latest }) => latest.device === device.value);
    points.replaceChildren(...known.map(({ latest }) => h('option', { value: latest.point })));
  };
  const offerDevices = () => {
    const names = (state.status?.components ?? []).filter(({ kind }) => kind === 'device').map(({ name }) => name);
    if (names.join('\n') === [...device.options].map((option) => option.value).join('\n')) return;
    device.replaceChildren(...names.map((name) => h('option', { value: name }, name)));
    offerPoints();
  };
  device.addEventListener('change', offerPoints);
  const details = h('details', { class: 'panel set', ontoggle: () => { offerDevices(); offerPoints(); } },
    h('summary', {}, 'Set a point by hand'),
    h('form', {
      onsubmit: async (event) => {
        event.preventDefault();
        button.disabled = true;
        setText(outcome, 'Waiting for the device …');
        outcome.className = 'outcome';
        try {
          const path = [device.value, point.value.trim()].map(encodeURIComponent).join('/');
          const answer = await request('POST', `/devices/${path}`, { value: parse(value.value.trim()) });
          setText(outcome, `Done: the device has ${show(answer.value, 3)}.`);
        } catch (error) {
          outcome.className = 'outcome problem';
          outcome.replaceChildren(...explain(error));
        }
        button.disabled = false;
      },
    },
    h('div', {}, h('label', { for: 'set-device' }, 'Device'), device),
    h('div', {}, h('label', { for: 'set-point' }, 'Point'), point, points),
    h('div', {}, h('label', { for: 'set-value' }, 'Value'), value),
    button, outcome));
  return { element: details };
}

// A number or a truth value where it reads like one, otherwise text.
function parse(text) {
  if (text === 'true' || text === 'false') return text === 'true';
  return text !== '' && Number.isFinite(Number(text)) ? Number(text) : text;
}
