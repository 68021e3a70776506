// What the page knows of the gateway: loaded once, kept up to date by live events, told to whoever shows it.

const listeners = new Map();

export const state = {
  status: null,
  user: null,
  values: new Map(), // 'device/point' to {latest, history, decimals}
  upstreams: null, // name to the view of the API, with history
  log: [],
  connection: 'connecting', // 'live', 'lost' or 'login'
  lostAt: null,
};

// Calls `listener` when `topic` changes, until the returned function is called.
export function on(topic, listener) {
  if (!listeners.has(topic)) listeners.set(topic, new Set());
  listeners.get(topic).add(listener);
  return () => listeners.get(topic).delete(listener);
}

function emit(topic, detail) {
  listeners.get(topic)?.forEach((listener) => listener(detail));
}

// The gateway's own time: its clock may differ from the browser's.
let skew = 0;
export const now = () => Date.now() + skew;

// An answer of the API that is not a success, with what to do about it.
export class ApiError extends Error {
  constructor(status, code, message, hint) {
    super(message);
    Object.assign(this, { status, code, hint });
  }
}

export async function request(method, path, body) {
  let response;
  try {
    response = await fetch(`/api/v1${path}`, {
      method,
      headers: body === undefined ? {} : { 'Content-Type': 'application/json' },
      body: body === undefined ? undefined : JSON.stringify(body),
    });
  } catch {
    throw new ApiError(0, 'unreachable', 'the gateway does not answer', 'Check that it runs and that this machine reaches it.');
  }
  if (response.ok) return response.status === 204 ? null : response.json();
  const { error = {} } = await response.json().catch(() => ({}));
  if (response.status === 401 && error.code === 'login_required') setConnection('login');
  throw new ApiError(response.status, error.code, error.message ?? `the gateway answered ${response.status}`, error.hint ?? '');
}

function setConnection(connection) {
  if (connection === 'login') stop();
  if (state.connection === connection) return;
  state.connection = connection;
  state.lostAt = connection === 'lost' ? Date.now() : null;
  emit('connection');
}

let source = null;
let retry = null;
let watchdog = null;
let pages = null;

// Without any event for this long the connection is dead: the gateway sends its status at least every 10 s.
const SILENCE = 25_000;
const RETRY = 3_000;
const KEPT_LINES = 1000;
const KEPT_HISTORY = 60;
const KEPT_LEVELS = 300;

// Opens the live view; it comes back by itself when it breaks.
export function start() {
  stop();
  source = new EventSource('/api/v1/events');
  source.onerror = () => {
    if (state.connection === 'live') setConnection('lost');
    // The browser tries again by itself, but not after an answer that is an error.
    if (source?.readyState === EventSource.CLOSED) retryLater();
  };
  const handle = (name, handler) => source.addEventListener(name, (event) => {
    feedWatchdog();
    handler(JSON.parse(event.data));
  });
  handle('hello', hello);
  handle('status', takeStatus);
  handle('values', takeValues);
  handle('gone', takeGone);
  handle('upstreams', takeUpstreams);
  handle('log', takeLog);
  handle('reload', loadValues);
  feedWatchdog();
}

function stop() {
  source?.close();
  source = null;
  clearTimeout(retry);
  clearTimeout(watchdog);
}

function feedWatchdog() {
  clearTimeout(watchdog);
  watchdog = setTimeout(() => {
    setConnection('lost');
    start();
  }, SILENCE);
}

async function retryLater() {
  stop();
  try {
    // Tells apart a gateway that wants a login from one that is away.
    await request('GET', '/status');
  } catch (error) {
    if (error.code === 'login_required') return;
    setConnection('lost');
  }
  clearTimeout(retry);
  retry = setTimeout(start, RETRY);
}

async function hello({ resumed, pages: current }) {
  if (pages !== null && pages !== current) location.reload();
  pages = current;
  try {
    if (!resumed || state.status === null) await load();
    setConnection('live');
  } catch (error) {
    if (error.code !== 'login_required') retryLater();
  }
}

async function load() {
  const [{ status, user }, values, upstreams, log] = await Promise.all(
    ['/status', '/values', '/upstreams', '/log'].map((path) => request('GET', path)));
  state.user = user;
  takeStatus(status);
  takeAllValues(values);
  state.upstreams = new Map(upstreams.upstreams.map((upstream) => [upstream.name, { history: [], ...upstream }]));
  emit('upstreams');
  state.log = log.lines;
  emit('log', null);
}

function takeStatus(status) {
  skew = Date.parse(status.time) - Date.now();
  state.status = status;
  emit('status');
}

async function loadValues() {
  try {
    takeAllValues(await request('GET', '/values'));
  } catch (error) {
    if (error.code !== 'login_required') retryLater();
  }
}

function takeAllValues({ values }) {
  const before = state.values;
  state.values = new Map(values.map(({ latest, history }) => {
    const key = `${latest.device}/${latest.point}`;
    const known = before.get(key);
    // An event may have overtaken this answer.
    if (known && known.latest.received > latest.received) return [key, known];
    return [key, { latest, history, decimals: Math.max(0, ...history.map(([, value]) => decimals(value))) }];
  }));
  emit('values', null);
}

function takeValues(values) {
  const changed = values.map((latest) => {
    const key = `${latest.device}/${latest.point}`;
    const entry = state.values.get(key) ?? { latest, history: [], decimals: 0 };
    entry.latest = latest;
    const isTrusted = latest.quality === 'good' || latest.quality === 'unknown';
    if (isTrusted && (typeof latest.value === 'number' || typeof latest.value === 'boolean')) {
      entry.history.push([latest.received, Number(latest.value)]);
      if (entry.history.length > KEPT_HISTORY) entry.history.shift();
      entry.decimals = Math.max(entry.decimals, decimals(Number(latest.value)));
    }
    state.values.set(key, entry);
    return key;
  });
  emit('values', changed);
}

// Digits after the point that a value needs, three at most; a point keeps the most it ever needed and so its width.
function decimals(value) {
  for (let digits = 0; digits < 3; digits += 1) {
    if (Math.abs(value - Number(value.toFixed(digits))) < 1e-9 * Math.max(1, Math.abs(value))) return digits;
  }
  return 3;
}

function takeGone(pairs) {
  pairs.forEach(([device, point]) => state.values.delete(`${device}/${point}`));
  emit('values', null);
}

function takeUpstreams({ upstreams }) {
  const before = state.upstreams ?? new Map();
  state.upstreams = new Map(upstreams.map((upstream) => [
    upstream.name, { ...upstream, history: before.get(upstream.name)?.history ?? [] },
  ]));
  emit('upstreams');
}

// The gateway samples queues once a second and sends only what changed; in between the level stays.
setInterval(() => {
  if (state.connection !== 'live' || state.upstreams === null) return;
  for (const upstream of state.upstreams.values()) {
    upstream.history.push(upstream.queue.messages);
    if (upstream.history.length > KEPT_LEVELS) upstream.history.shift();
  }
  emit('upstreams');
}, 1000);

function takeLog(lines) {
  const last = state.log[state.log.length - 1]?.sequence ?? 0;
  const fresh = lines.filter((line) => line.sequence > last);
  state.log.push(...fresh);
  state.log.splice(0, state.log.length - KEPT_LINES);
  if (fresh.length) emit('log', fresh);
}

export async function login(user, password) {
  await request('POST', '/login', { user, password });
  state.connection = 'connecting';
  emit('connection');
  start();
}

export async function logout() {
  await request('POST', '/logout');
  Object.assign(state, { status: null, user: null, values: new Map(), upstreams: null, log: [] });
  setConnection('login');
}

// A page nobody looks at gives its connection back; a browser has only six to one gateway.
let hidden = null;
document.addEventListener('visibilitychange', () => {
  clearTimeout(hidden);
  if (document.hidden) hidden = setTimeout(stop, 60_000);
  else if (source === null && state.connection !== 'login') start();
});
