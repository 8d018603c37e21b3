"""Demonstrators for MiniWoB tasks: JavaScript that reads the page and says the next act of the mouse or the keyboard.

Each looks at the page as it now is and keeps nothing in mind, so it also goes on where somebody else has acted before.
It never acts itself: what it says goes through the same mouse and keyboard as what a policy says.
"""

from __future__ import annotations

from typing import Final

# Pixels of the page. A place on an element is one where the element (or a child) is what a click meets.
HELPERS: Final = r"""
const q = (s) => document.querySelector(s), all = (s) => [...document.querySelectorAll(s)];
const said = core.getUtterance(), quoted = (said.match(/"(.*)"/) || [])[1];
const meets = (e, x, y) => x > 0 && y > 0 && x < 160 && y < 210 && e.contains(document.elementFromPoint(x, y));
const at = (e) => {
  for (const r of e.getClientRects())
    for (const [a, b] of [[.5, .5], [.5, .25], [.5, .75], [.25, .5], [.75, .5], [.1, .1], [.9, .1], [.1, .9], [.9, .9]])
      if (meets(e, r.left + a * r.width, r.top + b * r.height)) return [r.left + a * r.width, r.top + b * r.height];
  return null;
};
const click = (e) => { const p = at(e); return p && ['click', ...p]; };
const named = (s, name) => all(s).find((e) => e.textContent.trim() === name);
const fill = (e, want) =>
  e.value === want ? null :
  document.activeElement !== e ? click(e) :
  e.value && e.selectionEnd - e.selectionStart < e.value.length ? ['press', 'Control+a'] : ['type', want];
const submit = () => click(q('#subbtn') || q('#area button'));
const slide = (e, want, value) => {
  const handle = e.querySelector('.ui-slider-handle'), box = e.getBoundingClientRect(), s = $(e).slider('option');
  const flat = s.orientation === 'horizontal', unit = (flat ? box.width : box.height) / (s.max - s.min);
  if (value === want) return null;
  const [x, y] = at(handle), by = (want - value) * unit;
  if (Math.abs(want - value) > 2 * Math.max(1, 1 / unit))
    return flat ? ['drag', x, y, x + by, y] : ['drag', x, y, x, y - by];
  return document.activeElement === handle ? ['press', value < want ? 'ArrowRight' : 'ArrowLeft'] : ['click', x, y];
};
const fits = (e, words) => words.every((word) => {
  const kind = {rect: 'rectangle', circle: 'circle', polygon: 'triangle'}[e.tagName];
  const size = kind === 'circle' ? 2 * e.getAttribute('r') : kind === 'rectangle' ? +e.getAttribute('width') :
    kind ? e.getBBox().height : parseFloat(e.getAttribute('font-size'));
  const type = kind ? 'shape' : /[0-9]/.test(e.textContent) ? 'digit' : 'letter';
  return ['item', type, kind || e.textContent, e.getAttribute('fill'), size > 15 ? 'large' : 'small'].includes(word);
});
const boxes = (wanted) => {
  const wrong = all('#boxes label').find((l) => l.querySelector('input').checked !== wanted.includes(l.textContent));
  return wrong ? click(wrong.querySelector('input')) : submit();
};
"""

_NAMES = "said.match(/^Select (.*) and click/)[1].split(', ')"
ORACLES: Final[dict[str, str]] = {
    "click-button": "click(all('#area button').find((e) => e.textContent === quoted))",
    "click-button-sequence": "click(q(buttonsPushed.length ? '#subbtn2' : '#subbtn'))",
    "click-checkboxes": f"boxes({_NAMES})",
    "click-checkboxes-transfer": f"boxes({_NAMES})",
    "click-collapsible-nodelay": "q('#area .ui-accordion-content').offsetHeight ? submit() : click(q('#area h3'))",
    "click-color": "click(all('#area .color').find((e) => said.split(' ')[3] === e.dataset.color))",
    "click-dialog": "click(q('.ui-dialog-titlebar-close'))",
    "click-dialog-2": "click(quoted === 'x' ? q('.ui-dialog-titlebar-close') : named('.ui-dialog button', quoted))",
    "click-link": "click(named('.alink', quoted))",
    "click-option": f"boxes({_NAMES})",
    "click-shape": "click(all('#area_svg > *').find((e) => fits(e, said.split(' ').slice(3)) && at(e)))",
    "click-tab": "click(all('#area ul a').find((e) => said.includes(e.textContent)))",
    "click-tab-2-easy": "click(named('.alink', quoted))",
    "click-test": "submit()",
    "click-test-2": "submit()",
    "click-test-transfer": "submit()",
    "click-widget": "click(all('#area [data-type]').find((e) => e.dataset.type === quoted && at(e)))",
    "drag-box": "(([small, large], middle) => smallBoxContained() ? submit() : ['drag', ...middle(small),"
    " ...middle(large)])(all('#draggable > div').map((e) => e.getBoundingClientRect()),"
    " (r) => [r.left + r.width / 2, r.top + r.height / 2])",
    "enter-date": "(() => { const [m, d, y] = said.match(/[0-9]+/g), e = q('#tt'), r = e.getBoundingClientRect();"
    " return e.value === `${y}-${m}-${d}` ? submit() : document.activeElement === e ? ['type', m + d + y]"
    " : ['click', r.left + 8, r.top + r.height / 2]; })()",
    "enter-password": "fill(q('#password'), quoted) ?? fill(q('#verify'), quoted) ?? submit()",
    "enter-text": "fill(q('#tt'), quoted) ?? submit()",
    "enter-text-2": "fill(q('#tt'), /upper/.test(said) ? quoted.toUpperCase() : quoted.toLowerCase()) ?? submit()",
    "enter-text-dynamic": "fill(q('#tt'), quoted) ?? submit()",
    "focus-text": "click(q('#tt'))",
    "focus-text-2": "click(q('#tt' + said.match(/[0-9]/)[0]))",
    "grid-coordinate": "click(document.getElementById(said.match(/\\(.*\\)/)[0]))",
    "identify-shape": "(() => { const e = q('#area_svg > *');"
    " const kind = {rect: 'rectangle', circle: 'circle', polygon: 'triangle'}[e.tagName];"
    " return click(q(`[data-type=${kind || (/[0-9]/.test(e.textContent) ? 'digit' : 'letter')}]`)); })()",
    "login-user": "(([, user, secret]) => fill(q('#username'), user) ?? fill(q('#password'), secret) ?? submit())"
    '(said.match(/"(.*?)".*"(.*?)"/))',
    "read-table": "fill(q('#tt'), named('#tab td:first-child', said.match(/value of (.*) into/)[1])"
    ".nextSibling.textContent) ?? submit()",
    "scroll-text": "(() => { const e = q('#text-area'), r = e.getBoundingClientRect(), [x, y] = pointer;"
    " const hidden = e.scrollHeight - e.clientHeight - e.scrollTop > 1;"
    " if (hidden && !meets(e, x, y)) return ['move', ...at(e)];"
    " if (hidden) return ['scroll', 0, 10];"
    " return fill(q('#answer-input'), e.value.trim().split(/\\s/).pop().replace('.', '')) ?? submit(); })()",
    "simple-arithmetic": "(([, a, act, b]) => fill(q('#math-answer'),"
    " String(act === '+' ? +a + +b : act === '-' ? a - b : a * b)) ?? submit())"
    "(q('#math-problem').textContent.match(/([0-9]) (.) ([0-9])/))",
    "unicode-test": "click(all('#area button').find((e) => e.textContent === quoted))",
    "use-slider": "slide(q('#slider'), +said.match(/-?[0-9]+/)[0], +q('#val').textContent) ?? submit()",
    "use-slider-2": "JSON.parse(said.match(/\\[.*\\]/)[0]).reduce((done, want, i) => done ??"
    " slide(q(`#slider-${i + 1}`), want, +q(`#val-${i + 1}`).textContent), null) ?? submit()",
    "use-spinner": "((more) => more ? click(q(more > 0 ? '.ui-spinner-up' : '.ui-spinner-down')) : submit())"
    "(said.match(/-?[0-9]+/)[0] - q('#spinner').value)",
}


def script(task: str) -> str:
    """A function of the pointer's place ``[x, y]`` that gives the next act, such as ``["click", x, y]``.

    Null means that what to act on cannot be seen, ``["lost", why]`` that the page is not as it should be.
    """
    return f"(pointer) => {{ try {{ {HELPERS} return {ORACLES[task]}; }} catch (e) {{ return ['lost', `${{e}}`]; }} }}"
