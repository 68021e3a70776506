// The login: asked for when the gateway is opened from another machine.

import { explain, h, mark } from './dom.js';
import { login } from './store.js';

export function loginForm() {
  const user = h('input', { id: 'user', name: 'user', autocomplete: 'username', autocapitalize: 'none', spellcheck: 'false', required: true });
  const password = h('input', { id: 'password', name: 'password', type: 'password', autocomplete: 'current-password', required: true });
  const button = h('button', { type: 'submit', class: 'primary' }, 'Log in');
  const problem = h('p', { class: 'problem', role: 'alert' });
  const submit = async (event) => {
    event.preventDefault();
    button.disabled = true;
    problem.replaceChildren();
    try {
      await login(user.value.trim(), password.value);
    } catch (error) {
      problem.replaceChildren(...explain(error));
      password.value = '';
      password.focus();
    } finally {
      button.disabled = false;
    }
  };
  setTimeout(() => user.focus());
  return h('main', { class: 'login', id: 'main' },
    h('form', { onsubmit: submit },
      h('div', { class: 'login-name' }, mark(), h('h1', {}, 'Fieldgate')),
      h('p', { class: 'muted' }, location.host),
      h('label', { for: 'user' }, 'User'), user,
      h('label', { for: 'password' }, 'Password'), password,
      problem, button,
      location.protocol === 'http:'
        && h('p', { class: 'muted small' }, 'This connection is not encrypted. Set “web: { tls: … }” in the configuration to protect the password on its way.')));
}
