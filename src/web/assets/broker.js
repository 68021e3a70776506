// The broker: how much goes through, who is connected, what waits for whom.

import { levelChart } from './charts.js';
import {
  arrange, bytes, duration, emptyState, explain, h, healthBadge, number, plural, rate, sentence, setAttribute, setProse, setText,
} from './dom.js';
import { showFacts } from './overview.js';
import { now, on, request, state } from './store.js';

const REFRESH = 2000;
// Rows shown before somebody asks for more.
const FIRST_ROWS = 50;

export function broker(root) {
  const figures = ['Connected', 'Sessions', 'Messages in', 'Messages out', 'Dropped'].map((label) => {
    const value = h('dd', {}, '–');
    const note = h('p', { class: 'muted small' });
    return { value, note, element: h('div', {}, h('dt', {}, label), h('div', { class: 'figure' }, value), note) };
  });
  const chart = levelChart({ label: 'Messages per second', unit: 'messages per second', names: ['in', 'out'] });
  const sessions = sessionTable(() => refresh());
  const listeners = listenerTable();
  const problem = h('p', { class: 'problem', role: 'alert' });
  root.append(
    h('h1', {}, 'Broker'),
    h('section', { class: 'summary', 'aria-label': 'Traffic' }, h('dl', { class: 'figures' }, ...figures.map((figure) => figure.element))),
    h('div', { class: 'panel padded' }, chart.element),
    problem, listeners.element, sessions.element);
  let timer = null;
  let isGone = false;
  let asked = 0;
  const refresh = async () => {
    clearTimeout(timer);
    const turn = ++asked;
    if (state.connection !== 'lost' && !document.hidden) {
      try {
        const answer = await request('GET', `/clients?search=${encodeURIComponent(sessions.search())}`);
        // Somebody has looked for something else meanwhile.
        if (isGone || turn !== asked) return;
        const texts = [
          number(answer.connected), number(answer.total), `${rate(answer.received_per_second)} /s`, `${rate(answer.sent_per_second)} /s`, number(answer.dropped),
        ];
        texts.forEach((text, index) => setText(figures[index].value, text));
        const reasons = Object.entries(answer.dropped_by_reason).filter(([, count]) => count > 0);
        setText(figures[4].note, reasons.map(([reason, count]) => `${number(count)} ${reason.replaceAll('_', ' ')}`).join(', '));
        chart.update(answer.history.map(([received]) => received), answer.history.map(([, sent]) => sent));
        sessions.update(answer);
        problem.replaceChildren();
        root.classList.remove('is-loading');
      } catch (error) {
        problem.replaceChildren(...explain(error));
        root.classList.remove('is-loading');
      }
    }
    if (!isGone && turn === asked) timer = setTimeout(refresh, REFRESH);
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

// `look` is called when other sessions are wanted than those of the last answer.
function sessionTable(look) {
  const body = h('tbody');
  const rows = new Map();
  const filter = h('input', { id: 'client-filter', type: 'search', placeholder: 'Client, user or topic', autocomplete: 'off' });
  const head = h('thead', {}, h('tr', {}, ...COLUMNS.map((column) => h('th', { scope: 'col' }, column))));
  const whole = h('div', { class: 'panel' }, h('table', { class: 'cards' }, head, body));
  const empty = emptyState('Nobody is connected', 'Point an MQTT client at a listener below, as in', 'mosquitto_sub -h GATEWAY -t "devices/#" -v');
  const left = h('p', { class: 'muted small' });
  const all = h('button', { type: 'button', class: 'more' });
  let isAll = false;
  const element = h('section', { 'aria-label': 'Sessions' },
    h('div', { class: 'heading' }, h('h2', {}, 'Sessions'),
      h('label', { class: 'sr-only', for: 'client-filter' }, 'Show only sessions with'), filter),
    whole, empty, left, all);
  const word = () => filter.value.trim().toLowerCase();
  let last = null;
  const component = {
    element,
    // What to look for: kinds of session by the name that the API has for them.
    search: () => Object.keys(FACES).find((face) => word().length > 2 && FACES[face].toLowerCase().startsWith(word())) ?? word(),
    update(answer) {
      last = answer;
      const clients = answer.clients.slice(0, isAll ? undefined : FIRST_ROWS);
      whole.hidden = clients.length === 0;
      empty.hidden = answer.total > 0;
      const ids = new Set(clients.map((client) => client.client_id));
      for (const id of rows.keys()) if (!ids.has(id)) rows.delete(id);
      for (const client of clients) {
        if (!rows.has(client.client_id)) rows.set(client.client_id, sessionRow());
        rows.get(client.client_id).update(client);
      }
      arrange(body, clients.map((client) => rows.get(client.client_id).element));
      const beyond = answer.found - answer.clients.length;
      const none = answer.found === 0 && answer.total > 0;
      setText(left, none ? 'No session has that.' : beyond > 0 ? `${plural(beyond, 'more session')} not listed; look for a client, a user or a topic.` : '');
      all.hidden = clients.length === answer.clients.length;
      setText(all, `Show all ${number(answer.clients.length)}`);
    },
  };
  filter.addEventListener('input', look);
  all.addEventListener('click', () => { isAll = true; component.update(last); });
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
        setProse(reason, sentence(component.reason ?? ''));
        showFacts(facts, component.facts);
      }
      arrange(body, all.map(({ name }) => rows.get(name).item));
    },
  };
}
