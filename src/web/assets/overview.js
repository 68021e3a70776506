// The first view: is the gateway well, does the uplink flow, what do the devices say now.

import { levelChart, sparkline } from './charts.js';
import {
  age, arrange, bytes, duration, emptyState, explain, h, healthBadge, healthWord, icon, moment, number, plural, rate, sentence, setAttribute, setIcon, setProse, setText,
} from './dom.js';
import { now, on, request, state } from './store.js';

export function overview(root) {
  const parts = [header(), uplinks(), attention(), values()];
  root.append(
    parts[0].element,
    h('div', { class: 'split' }, parts[1].element, parts[2].element),
    parts[3].element);
  const updates = [
    on('status', () => { parts[0].update(); parts[2].update(); parts[3].updateDevices(); }),
    on('upstreams', () => { parts[1].update(); parts[0].update(); }),
    on('values', (changed) => parts[3].update(changed)),
  ];
  const timer = setInterval(() => parts[3].updateAges(), 1000);
  if (state.status) parts.forEach((part) => part.update(null));
  return () => {
    updates.forEach((stop) => stop());
    clearInterval(timer);
  };
}

const SUMMARY = {
  good: 'Everything is working',
  starting: 'Starting up',
  degraded: 'Working, but something needs attention',
  down: 'Not working',
};

function header() {
  const name = h('h1', {}, '\u00a0');
  const badge = healthBadge('starting', (health) => SUMMARY[health] ?? healthWord(health));
  const figures = ['Devices', 'Messages in', 'Messages out', 'Waiting to be sent', 'Running for'].map((label) => {
    const value = h('dd', {}, '–');
    const unit = h('span', { class: 'unit' });
    return { value, unit, element: h('div', {}, h('dt', {}, label), h('div', { class: 'figure' }, value, unit)) };
  });
  const element = h('section', { class: 'summary', 'aria-label': 'Summary' },
    h('div', { class: 'summary-name' }, name, badge.element),
    h('dl', { class: 'figures' }, ...figures.map((figure) => figure.element)));
  const set = (index, value, unit) => {
    setText(figures[index].value, value);
    setText(figures[index].unit, unit);
  };
  return {
    element,
    update() {
      const { status } = state;
      if (!status) return;
      setText(name, status.gateway);
      badge.update(status.health);
      const devices = status.components.filter((component) => component.kind === 'device');
      const good = devices.filter((device) => device.health === 'good').length;
      set(0, devices.length ? `${good} of ${devices.length}` : '0', devices.length ? 'good' : '');
      set(1, rate(status.received_per_second), '/s');
      set(2, rate(status.sent_per_second), '/s');
      const waiting = [...(state.upstreams?.values() ?? [])].reduce((sum, upstream) => sum + upstream.queue.messages, 0);
      set(3, number(waiting), waiting === 1 ? 'message' : 'messages');
      set(4, duration(status.uptime_seconds), '');
    },
  };
}

function uplinks() {
  const list = h('div', { class: 'stack' });
  const element = h('section', { 'aria-label': 'Uplinks' }, h('h2', {}, 'Uplink'), list);
  const cards = new Map();
  const empty = emptyState('No uplink is configured',
    'Readings stay on this gateway. To send them on, name a broker in the configuration file and reload.',
    'upstreams:\n  - name: cloud\n    url: mqtts://broker.example:8883\n    out: [ { filter: "devices/#", qos: 1 } ]');
  return {
    element,
    update() {
      if (!state.upstreams) return;
      const all = [...state.upstreams.values()];
      for (const { name } of all) if (!cards.has(name)) cards.set(name, uplink(name));
      for (const name of cards.keys()) if (!state.upstreams.has(name)) cards.delete(name);
      all.forEach((upstream) => cards.get(upstream.name).update(upstream));
      arrange(list, all.length ? all.map(({ name }) => cards.get(name).element) : [empty]);
    },
  };
}

// What an uplink does that is meant not to be connected.
const RESTING = { idle: 'Idle', scheduled: 'Outside its hours' };

function uplink(name) {
  let doing = 'starting', byHand = false;
  const words = () => ({ good: 'Connected', down: 'No connection', starting: 'Connecting', paused: RESTING[doing] ?? (byHand ? 'Not connected' : 'Cut') });
  const badge = healthBadge('starting', (health) => words()[health] ?? healthWord(health));
  const mark = icon('cut');
  const label = h('span', {}, 'Cut uplink');
  const button = h('button', { type: 'button', class: 'switch' }, mark, label);
  const now = h('button', { type: 'button', class: 'now', 'aria-label': `Connect uplink ${name} now` }, 'Connect now');
  const reason = h('p', { class: 'reason' });
  const problem = h('p', { class: 'problem', role: 'alert' });
  const waiting = h('strong', { class: 'large' }, '0');
  const room = h('p', { class: 'muted small' });
  const outlook = h('p', { class: 'outlook' });
  const facts = h('dl', { class: 'facts' });
  const chart = levelChart({ label: 'Waiting messages', unit: 'messages' });
  let paused = false;
  const act = (element, action) => element.addEventListener('click', async () => {
    element.disabled = true;
    problem.replaceChildren();
    try {
      await request('POST', `/upstreams/${encodeURIComponent(name)}/${action()}`);
    } catch (error) {
      problem.replaceChildren(...explain(error));
    }
    element.disabled = false;
  });
  act(button, () => paused ? 'resume' : 'pause');
  act(now, () => 'connect');
  const purge = purging(name, problem);
  const element = h('article', { class: 'panel uplink', 'data-upstream': name },
    h('header', {}, h('h3', {}, icon('cloud'), name), badge.element, h('div', { class: 'actions' }, now, button)),
    reason, problem,
    h('div', { class: 'uplink-body' },
      h('div', { class: 'uplink-queue' },
        h('p', { class: 'label' }, 'Waiting to be sent'),
        h('p', {}, waiting, h('span', { class: 'unit' }, 'messages')),
        outlook, room, purge.element),
      chart.element),
    facts);
  return {
    element,
    update(upstream) {
      const { queue, status } = upstream;
      paused = upstream.paused;
      doing = upstream.state;
      now.hidden = paused || !RESTING[doing];
      byHand = upstream.connection === 'manual';
      badge.update(paused ? 'paused' : status?.health ?? 'unknown');
      setIcon(mark, paused ? 'link' : 'cut');
      const offer = !paused ? 'Cut' : byHand ? 'Connect' : 'Restore';
      setText(label, `${offer} uplink`);
      setAttribute(button, 'aria-label', `${offer} uplink ${name}`);
      button.classList.toggle('primary', paused);
      setProse(reason, sentence(status?.reason ?? ''));
      setText(waiting, number(queue.messages));
      setText(outlook, expect(upstream));
      setText(room, roomFor(queue));
      purge.update(queue.messages);
      chart.update(upstream.history);
      // The queue is shown above already, in numbers that move.
      showFacts(facts, (status?.facts ?? []).filter(([label]) => label !== 'waiting' && label !== 'backlog'));
    },
  };
}

// Throws what waits away, after a second click that says how much that is.
function purging(name, problem) {
  let messages = 0, isAsking = false;
  const offer = h('button', { type: 'button', class: 'quiet', 'aria-label': `Discard what waits for uplink ${name}` }, 'Discard');
  const sure = h('button', { type: 'button', class: 'danger' });
  const keep = h('button', { type: 'button' }, 'Keep');
  const question = h('span', { class: 'actions' }, sure, keep);
  const show = () => {
    offer.hidden = isAsking || messages === 0;
    question.hidden = !isAsking;
    setText(sure, `Discard ${plural(messages, 'message')} for good`);
  };
  const ask = (asks) => { isAsking = asks; show(); };
  offer.addEventListener('click', () => { ask(true); keep.focus(); });
  keep.addEventListener('click', () => ask(false));
  sure.addEventListener('click', async () => {
    sure.disabled = true;
    problem.replaceChildren();
    try {
      await request('POST', `/clients/upstream/${encodeURIComponent(name)}/purge`);
    } catch (error) {
      problem.replaceChildren(...explain(error));
    }
    sure.disabled = false;
    ask(false);
  });
  show();
  return { element: h('p', { class: 'purge' }, offer, question), update(count) { messages = count; show(); } };
}

// How full the queue is, of what it may hold.
function roomFor(queue) {
  const { messages, bytes: size, max_messages: maxMessages, max_bytes: maxBytes } = queue;
  const full = fullness(queue);
  const room = [maxMessages && plural(maxMessages, 'message'), maxBytes && bytes(maxBytes)].filter(Boolean).join(' or ');
  const used = messages ? `${bytes(size)}, ${full < 0.01 ? 'less than 1' : Math.floor(full * 100)} % of the room for` : 'Room for';
  return room ? `${used} ${room}.` : bytes(size);
}

// What is on its way, and counted here, is beside the limits.
function fullness({ messages, bytes: size, max_messages: maxMessages, max_bytes: maxBytes }) {
  return Math.min(1, Math.max(maxMessages ? messages / maxMessages : 0, maxBytes ? size / maxBytes : 0));
}

// What the queue will come to, in a sentence.
function expect({ queue, backlog, outlook, status }) {
  if (backlog && backlog.seconds_left !== null) {
    // The backlog was counted a moment before the queue.
    const left = Math.min(backlog.messages, queue.messages);
    return `A backlog of ${number(left)} goes out, ${rate(backlog.rate)} a second, gone in about ${duration(backlog.seconds_left)}.`;
  }
  const speed = `${rate(Math.abs(outlook.rate))} a second`;
  if (outlook.empty_in_seconds !== null) return `Shrinking by ${speed}, empty in about ${duration(outlook.empty_in_seconds)}.`;
  if (outlook.full_in_seconds !== null) return `Growing by ${speed}, room for about ${duration(outlook.full_in_seconds)}.`;
  if (queue.messages === 0) return status?.health === 'good' ? 'All sent, nothing waits.' : 'Nothing waits.';
  return fullness(queue) >= 1 ? 'Full.' : 'Standing still.';
}

export function showFacts(list, facts) {
  const known = list.children.length === facts.length;
  if (!known) list.replaceChildren(...facts.map(() => h('div', {}, h('dt'), h('dd'))));
  facts.forEach(([label, value], index) => {
    const [term, text] = list.children[index].children;
    setText(term, label);
    setProse(text, readable(label, value));
  });
}

const TIME = /^\d{4}-\d\d-\d\dT[\d:.]+Z/;

// Times in the browser's zone and byte counts in units, as people read them.
function readable(label, value) {
  if (TIME.test(value)) return value.replace(TIME, (time) => moment(Date.parse(time)));
  return / bytes$/.test(label) && /^\d+$/.test(value) ? bytes(Number(value)) : value;
}

const SHOWN_FAULTS = 6;

const KINDS = { device: 'Device', adapter: 'Adapter', upstream: 'Uplink', listener: 'Listener', store: 'Store' };

// What a component is, and of an adapter how much hangs on it.
function label({ kind, name }, components) {
  const devices = kind === 'adapter' ? components.filter((component) => component.kind === 'device' && component.parent === name).length : 0;
  const word = KINDS[kind] ?? kind;
  return devices ? `${word} with ${plural(devices, 'device')}` : word;
}

// What is not well, and what to do; otherwise what there is.
function attention() {
  const list = h('ul', { class: 'rows' });
  const title = h('h2', {}, 'Health');
  const rows = new Map();
  const element = h('section', { 'aria-label': 'Health' }, title, h('div', { class: 'panel' }, list));
  return {
    element,
    update() {
      if (!state.status) return;
      const rank = { down: 0, degraded: 1, paused: 2, starting: 3 };
      const { components } = state.status;
      const isDown = (name) => components.some((component) => component.kind === 'adapter' && component.name === name && component.health === 'down');
      // Devices behind an adapter that is down are not a second fault.
      const wrong = components
        .filter((component) => component.health in rank && !(component.kind === 'device' && isDown(component.parent)))
        .sort((one, other) => rank[one.health] - rank[other.health]);
      const shown = wrong.slice(0, SHOWN_FAULTS).map((component) => ({
        key: `${component.kind}/${component.name}`,
        health: component.health,
        title: component.name,
        note: `${label(component, components)}, ${healthWord(component.health).toLowerCase()} for ${duration((now() - Date.parse(component.since)) / 1000)}`,
        text: component.reason ?? '',
      }));
      const more = wrong.slice(SHOWN_FAULTS);
      if (more.length) {
        shown.push({ key: '…', health: more[0].health, title: `${more.length} more`, note: '', text: more.map(({ name }) => name).join(', ') });
      }
      const good = state.status.components.filter((component) => component.health === 'good');
      const counts = Object.entries(KINDS).map(([kind, label]) => [good.filter((component) => component.kind === kind).length, label]);
      const text = counts.filter(([count]) => count > 0).map(([count, label]) => plural(count, label.toLowerCase())).join(', ');
      if (good.length) shown.push({ key: 'good', health: 'good', title: shown.length ? 'Good' : 'Nothing needs attention', note: '', text });
      if (!state.status.clock_set) {
        shown.unshift({ key: 'clock', health: 'degraded', title: 'The clock is not set', note: '', text: 'Readings carry a wrong time until it is. Check that this machine reaches a time server.' });
      }
      for (const item of shown) {
        if (!rows.has(item.key)) rows.set(item.key, row());
        rows.get(item.key).update(item);
      }
      arrange(list, shown.map((item) => rows.get(item.key).element));
    },
  };
}

function row() {
  const mark = icon('good');
  const parts = { title: h('strong'), note: h('span', { class: 'muted' }), text: h('p') };
  const element = h('li', {}, mark, h('div', {}, h('p', {}, parts.title, ' ', parts.note), parts.text));
  return {
    element,
    update(item) {
      setIcon(mark, item.health);
      setAttribute(element, 'data-health', item.health);
      for (const name of ['title', 'note']) setText(parts[name], item[name]);
      setProse(parts.text, sentence(item.text));
    },
  };
}

function values() {
  const grid = h('div', { class: 'grid' });
  const element = h('section', { 'aria-label': 'Live values' }, h('h2', {}, 'Live values'), grid);
  const panels = new Map();
  const empty = emptyState('No values yet',
    'Add a device to the configuration file and reload. Whatever publishes to devices/DEVICE/POINT on this broker shows up here by itself.',
    'modbus:\n  - name: bus1\n    tcp: 10.0.0.5:502\n    devices:\n      - name: meter\n        unit_id: 1\n        points: [ { name: voltage, holding_register: 0, type: f32, unit: V } ]');
  const component = {
    element,
    updateDevices() {
      const devices = state.status.components.filter(({ kind }) => kind === 'device');
      if (devices.some(({ name }) => !panels.has(name))) layOut();
      for (const [device, panel] of panels) panel.updateHealth(find(device));
    },
    updateAges() {
      for (const panel of panels.values()) panel.updateAges();
    },
    // `changed` is null when all may have changed, else the keys that did.
    update(changed) {
      if (!state.status) return;
      const isNew = (changed ?? []).some((key) => !panels.get(state.values.get(key)?.latest.device)?.has(key));
      if (changed === null || changed === undefined || isNew) layOut();
      else changed.forEach((key) => panels.get(state.values.get(key).latest.device).update(key));
    },
  };
  const find = (device) => state.status?.components.find(({ kind, name }) => kind === 'device' && name === device);
  function layOut() {
    const devices = new Map();
    for (const component of state.status.components) if (component.kind === 'device') devices.set(component.name, []);
    const keys = [...state.values.keys()].sort();
    for (const key of keys) {
      const { device } = state.values.get(key).latest;
      if (!devices.has(device)) devices.set(device, []);
      devices.get(device).push(key);
    }
    for (const device of panels.keys()) if (!devices.has(device)) panels.delete(device);
    for (const [device, keys] of devices) {
      if (!panels.has(device)) panels.set(device, devicePanel(device));
      panels.get(device).layOut(keys, find(device));
    }
    arrange(grid, devices.size ? [...devices.keys()].map((device) => panels.get(device).element) : [empty]);
  }
  return component;
}

function devicePanel(device) {
  const badge = healthBadge('unknown');
  const adapter = h('span', { class: 'muted' });
  const list = h('ul', { class: 'points' });
  const none = h('p', { class: 'muted none' });
  const rows = new Map();
  const element = h('article', { class: 'panel device', 'data-device': device },
    h('header', {}, h('h3', {}, device), adapter, badge.element), list, none);
  const panel = {
    element,
    has: (key) => rows.has(key),
    update: (key) => rows.get(key).update(state.values.get(key)),
    updateHealth(component) {
      badge.element.hidden = !component;
      if (!component) return;
      badge.update(component.health);
      setText(adapter, component.parent ?? '');
      setProse(none, sentence(component.reason ?? 'No value yet.'));
      none.hidden = component.reason === null && rows.size > 0;
    },
    updateAges() {
      for (const row of rows.values()) row.updateAge();
    },
    layOut(keys, component) {
      for (const key of rows.keys()) if (!keys.includes(key)) rows.delete(key);
      for (const key of keys) {
        if (!rows.has(key)) rows.set(key, pointRow());
        panel.update(key);
      }
      arrange(list, keys.map((key) => rows.get(key).element));
      none.hidden = rows.size > 0;
      panel.updateHealth(component);
    },
  };
  return panel;
}

function pointRow() {
  const name = h('span', { class: 'point-name' });
  const note = h('span', { class: 'point-note' });
  const spark = sparkline();
  const value = h('span', { class: 'point-value' });
  const unit = h('span', { class: 'unit' });
  const element = h('li', {},
    h('span', { class: 'point-label' }, name, note), spark.element, h('span', { class: 'point-reading' }, value, unit));
  let latest = null;
  const row = {
    element,
    update(entry) {
      latest = entry.latest;
      setAttribute(element, 'data-quality', latest.quality);
      setAttribute(element, 'data-point', latest.point);
      setText(name, latest.point);
      const text = show(latest.value, entry.decimals);
      setText(value, text);
      element.classList.toggle('is-text', typeof latest.value === 'string');
      setText(unit, latest.unit ?? '');
      spark.update(entry.history, typeof latest.value === 'boolean');
      row.updateAge();
    },
    updateAge() {
      const when = age((now() - latest.received) / 1000);
      const quality = { stale: 'stale, ', bad: 'bad, ' }[latest.quality] ?? '';
      setText(note, `${quality}${latest.reason ? `${latest.reason}, ` : ''}${when}`);
    },
  };
  return row;
}

export function show(value, decimals) {
  if (value === null || value === undefined) return '–';
  return typeof value === 'number' ? number(value, Math.abs(value) >= 1e6 ? 0 : decimals) : String(value);
}
