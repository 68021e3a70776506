// The page: the frame around the views, which view is shown, and whether the gateway is there.

import { broker } from './broker.js';
import { devices } from './devices.js';
import { age, h, icon, mark, setAttribute, setText } from './dom.js';
import { log } from './log.js';
import { loginForm } from './login.js';
import { overview } from './overview.js';
import { logout, on, start, state } from './store.js';

const VIEWS = [
  { path: '', title: 'Overview', icon: 'overview', view: overview },
  { path: 'devices', title: 'Devices', icon: 'devices', view: devices },
  { path: 'broker', title: 'Broker', icon: 'broker', view: broker },
  { path: 'log', title: 'Log', icon: 'log', view: log },
];

const app = document.getElementById('app');
const gateway = h('span', { class: 'frame-gateway' }, '\u00a0');
const link = h('span', { class: 'frame-link', role: 'status' });
const leave = h('button', { type: 'button', class: 'quiet', hidden: true, onclick: () => logout().catch(() => {}) },
  icon('leave'), h('span', {}, 'Log out'));
const tabs = VIEWS.map(({ path, title, icon: name }) => h('a', { href: `#/${path}` }, icon(name), h('span', {}, title)));
const notice = h('div', { class: 'notice', hidden: true, role: 'status' });
const main = h('main', { id: 'main', tabindex: '-1' });
const frame = [
  h('header', { class: 'frame' },
    h('a', { class: 'frame-name', href: '#/' }, mark(), h('span', { class: 'frame-words' }, h('strong', {}, 'Fieldgate'), gateway)),
    h('nav', { 'aria-label': 'Views' }, ...tabs),
    h('div', { class: 'frame-foot' }, link, leave)),
  h('div', { class: 'content' }, notice, main),
];

// What the shown view wants undone when it goes.
let leaveView = () => {};
let shown = null;

function show() {
  const isLogin = state.connection === 'login';
  const path = location.hash.replace(/^#\/?/, '');
  const view = VIEWS.find((view) => view.path === path) ?? VIEWS[0];
  const next = isLogin ? 'login' : view.path;
  if (shown === next) return;
  const isFirst = shown === null;
  shown = next;
  leaveView();
  main.replaceChildren();
  if (isLogin) {
    leaveView = () => {};
    app.replaceChildren(loginForm());
    document.title = 'Log in – Fieldgate';
    return;
  }
  if (app.firstElementChild !== frame[0]) app.replaceChildren(...frame);
  tabs.forEach((tab, index) => setAttribute(tab, 'aria-current', VIEWS[index] === view ? 'page' : null));
  // Nothing is shown before something is known, so that nothing jumps.
  main.classList.toggle('is-loading', state.status === null);
  leaveView = view.view(main) ?? (() => {});
  updateTitle(view);
  // Who uses a keyboard or a screen reader goes on at the top of the new view.
  if (!isFirst) {
    scrollTo(0, 0);
    main.focus({ preventScroll: true });
  }
}

function updateTitle(view = VIEWS.find((view) => view.path === shown)) {
  if (view) document.title = `${view.title} – ${state.status?.gateway ?? 'Fieldgate'}`;
}

function showConnection() {
  const words = { live: 'Live', connecting: 'Connecting', lost: 'No connection', login: '' };
  setText(link, words[state.connection]);
  setAttribute(link, 'data-connection', state.connection);
  notice.hidden = state.connection !== 'lost';
  document.body.classList.toggle('is-lost', state.connection === 'lost');
  if (state.connection === 'lost') updateNotice();
  show();
}

function updateNotice() {
  if (state.lostAt === null) return;
  const since = age((Date.now() - state.lostAt) / 1000);
  setText(notice, `The gateway does not answer; what you see was true ${since === 'now' ? 'just now' : since}. `
    + 'Trying again. If this lasts, check its power and network, then “systemctl status fieldgate”.');
}

on('connection', showConnection);
on('status', () => {
  if (shown !== 'broker') main.classList.remove('is-loading');
  setText(gateway, state.status.gateway);
  leave.hidden = state.user === null;
  updateTitle();
});
addEventListener('hashchange', show);
setInterval(updateNotice, 5000);
showConnection();
start();
