// The broker: how much goes through, who is connected, what waits for whom.

import { levelChart } from './charts.js';
import { arrange, bytes, duration, emptyState, explain, h, healthBadge, number, plural, rate, setAttribute, setProse, setText } from './dom.js';
import { showFacts } from './overview.js';
import { now, on, request, state } from './store.js';

const REFRESH = 2000;

export function broker(root) {
  const figures = ['Connected', 'Sessions', 'Messages in', 'Messages out', 'Dropped'].map((label) => {
    const value = h('dd', {}, '–');
    return { value, element: h('div', {}, h('dt', {}, label), h('div', { class: 'figure' }, value)) };
  });
  const chart = levelChart({ label: 'Messages per second', unit: 'messages per second', names: ['in', 'out'] });
  const sessions = sessionTable();
  const listeners = listenerTable();
  const problem = h('p', { class: 'problem', role: 'alert' });
  root.append(
    h('h1', {}, 'Broker'),
    h('section', { class: 'summary', 'aria-label': 'Traffic' }, h('dl', { class: 'figures' }, ...figures.map((figure) => figure.element))),
    h('div', { class: 'panel padded' }, chart.element),
    problem, sessions.element, listeners.element);
  let timer = null;
  let isGone = false;
  const refresh = async () => {
    if (state.connection !== 'lost' && !document.hidden) {
      try {
        const answer = await request('GET', '/clients');
        if (isGone) return;
        const texts = [
          number(answer.connected), number(answer.total), `${rate(answer.received_per_second)} /s`, `${rate(answer.sent_per_second)} /s`, number(answer.dropped),
        ];
        texts.forEach((text, index) => setText(figures[index].value, text));
        chart.update(answer.history.map(([received]) => received), answer.history.map(([, sent]) => sent));
        sessions.update(answer);
        problem.replaceChildren();
        root.classList.remove('is-loading');
      } catch (error) {
        problem.replaceChildren(...explain(error));
        root.classList.remove('is-loading');
      }
    }
    if (!isGone) timer = setTimeout(refresh, REFRESH);
  };
  root.classList.add('is-loading');
  chart.update([], []);
  refresh();
  listeners.update();
  const stop = on('status', listeners.update);
  return () => {
    isGone = true;
    clearTimeout(timer);
    stop();
  };
}

const COLUMNS = ['Client', 'Kind', 'State', 'Messages', 'Waiting', 'Subscriptions'];

function sessionTable() {
  const body = h('tbody');
  const rows = new Map();
  const filter = h('input', { id: 'client-filter', type: 'search', placeholder: 'Client, user or topic', autocomplete: 'off' });
  const head = h('thead', {}, h('tr', {}, ...COLUMNS.map((column) => h('th', { scope: 'col' }, column))));
  const whole = h('div', { class: 'panel' }, h('table', { class: 'cards' }, head, body));
  const empty = emptyState('Nobody is connected', 'Point an MQTT client at a listener below, as in', 'mosquitto_sub -h GATEWAY -t "devices/#" -v');
  const left = h('p', { class: 'muted small' });
  const element = h('section', { 'aria-label': 'Sessions' },
    h('div', { class: 'heading' }, h('h2', {}, 'Sessions'),
      h('label', { class: 'sr-only', for: 'client-filter' }, 'Show only sessions with'), filter),
    whole, empty, left);
  let last = { clients: [], total: 0 };
  const component = {
    element,
    update(answer = last) {
      last = answer;
      const word = filter.value.trim().toLowerCase();
      const clients = answer.clients.filter((client) => !word
        || [client.client_id, client.user ?? '', client.peer ?? '', FACES[client.face] ?? '', ...client.subscriptions].some((text) => text.toLowerCase().includes(word)));
      whole.hidden = clients.length === 0;
      empty.hidden = answer.clients.length > 0;
      for (const id of rows.keys()) if (!answer.clients.some((client) => client.client_id === id)) rows.delete(id);
      for (const client of clients) {
        if (!rows.has(client.client_id)) rows.set(client.client_id, sessionRow());
        rows.get(client.client_id).update(client);
      }
      arrange(body, clients.map((client) => rows.get(client.client_id).element));
      const hidden = answer.total - answer.clients.length;
      const none = word && clients.length === 0 && answer.clients.length > 0;
      setText(left, none ? 'No session has that.' : hidden > 0 ? `${plural(hidden, 'more session')} not shown.` : '');
    },
  };
  filter.addEventListener('input', () => component.update());
  return component;
}

const FACES = { 'mqtt': 'MQTT', 'mqtt-sn': 'MQTT-SN', 'upstream': 'Uplink', 'adapter': 'Adapter', 'web': 'Web UI' };

function sessionRow() {
  const parts = {
    client: h('strong', { class: 'mono' }), user: h('span', { class: 'muted small block' }), kind: h('span', { class: 'nowrap' }),
    state: h('span', { class: 'presence nowrap' }), peer: h('span', { class: 'muted small block' }),
    traffic: h('span', { class: 'nowrap' }), dropped: h('span', { class: 'muted small block' }),
    waiting: h('span', { class: 'nowrap' }), size: h('span', { class: 'muted small block' }),
    filters: h('span', { class: 'mono small' }), more: h('span', { class: 'muted small' }),
  };
  const cells = [
    [parts.client, parts.user], parts.kind, [parts.state, parts.peer], [parts.traffic, parts.dropped], [parts.waiting, parts.size],
    [parts.filters, parts.more],
  ];
  const element = h('tr', {}, ...cells.map((cell, index) => h('td', { 'data-label': COLUMNS[index] }, h('div', {}, cell))));
  return {
    element,
    update(client) {
      setText(parts.client, client.client_id);
      setText(parts.peer, client.peer ?? '');
      setText(parts.user, client.user ? `user ${client.user}` : '');
      setText(parts.kind, [FACES[client.face] ?? client.face, client.version ?? ''].join(' ').trim());
      setAttribute(parts.state, 'data-connected', client.connected);
      const time = client.since === null ? '' : ` for ${duration((now() - Date.parse(client.since)) / 1000)}`;
      setText(parts.state, `${client.connected ? 'Connected' : 'Away'}${time}`);
      setText(parts.traffic, `${number(client.received)} in, ${number(client.sent)} out`);
      setText(parts.dropped, client.dropped ? `${number(client.dropped)} dropped` : '');
      setText(parts.waiting, client.queued_messages ? plural(client.queued_messages, 'message') : '–');
      setText(parts.size, client.queued_messages ? bytes(client.queued_bytes) : '');
      setText(parts.filters, client.subscriptions.slice(0, 3).join('  ') || '–');
      const more = client.subscription_count - Math.min(3, client.subscriptions.length);
      setText(parts.more, more > 0 ? ` and ${more} more` : '');
      setAttribute(parts.filters, 'title', client.subscriptions.length > 3 ? client.subscriptions.join('\n') : null);
    },
  };
}

function listenerTable() {
  const body = h('ul', { class: 'rows wide' });
  const rows = new Map();
  const element = h('section', { 'aria-label': 'Listeners and store' }, h('h2', {}, 'Listeners and store'), h('div', { class: 'panel' }, body));
  return {
    element,
    update() {
      if (!state.status) return;
      const all = state.status.components.filter((component) => component.kind === 'listener' || component.kind === 'store');
      for (const component of all) {
        if (!rows.has(component.name)) {
          const badge = healthBadge();
          const facts = h('dl', { class: 'facts' });
          const reason = h('p', { class: 'reason' });
          const item = h('li', {}, h('div', { class: 'rows-name' }, h('strong', {}, component.name), badge.element), h('div', {}, reason, facts));
          rows.set(component.name, { item, badge, facts, reason });
        }
        const { badge, facts, reason } = rows.get(component.name);
        badge.update(component.health);
        setProse(reason, component.reason ?? '');
        showFacts(facts, component.facts);
      }
      arrange(body, all.map(({ name }) => rows.get(name).item));
    },
  };
}
