/**
 * Markdown of a model, which is to be trusted as little as text from a stranger, to nodes of this page.
 *
 * The order is fixed: parse with raw HTML off, then sanitise the HTML made, then decorate the nodes that are left.
 * Nothing is ever fetched by showing an answer: an image becomes a link.
 */

import DOMPurify from 'dompurify';
import MarkdownIt from 'markdown-it';
import { messages } from './messages.ts';

const ALLOWED_ADDRESS = /^(?:https?:\/\/|mailto:)/i;
const TAGS =
  'a blockquote br code del em h1 h2 h3 h4 h5 h6 hr li ol p pre s strong table tbody td th thead tr ul'.split(' ');

const parser = new MarkdownIt({ html: false, linkify: true, breaks: true });
parser.linkify.set({ fuzzyLink: false, fuzzyEmail: false });
parser.validateLink = (address: string) => ALLOWED_ADDRESS.test(address);

const { escapeHtml } = parser.utils;
parser.renderer.rules.image = (tokens, index) => {
  const image = tokens[index]!;
  const address = String(image.attrGet('src'));
  return `<a href="${escapeHtml(address)}">${escapeHtml(messages.image(image.content || address))}</a>`;
};
// Column alignment comes as a style attribute, which the content security policy forbids.
parser.renderer.rules.th_open = parser.renderer.rules.td_open = (tokens, index, options, _env, self) => {
  const cell = tokens[index]!;
  const align = /text-align:(left|center|right)/.exec(String(cell.attrGet('style')))?.[1];
  cell.attrs = align ? [['align', align]] : null;
  return self.renderToken(tokens, index, options);
};

export function render(source: string): DocumentFragment {
  const fragment = DOMPurify.sanitize(parser.render(source), {
    ALLOWED_TAGS: TAGS,
    ALLOWED_ATTR: ['href', 'start', 'align'],
    ALLOWED_URI_REGEXP: ALLOWED_ADDRESS,
    ADD_URI_SAFE_ATTR: ['start', 'align'],
    ALLOW_DATA_ATTR: false,
    ALLOW_ARIA_ATTR: false,
    RETURN_DOM_FRAGMENT: true,
  });
  for (const link of fragment.querySelectorAll('a')) showWhereItLeads(link);
  return fragment;
}

/** Opens elsewhere, tells the other side nothing, and names the host if the words of the link do not. */
function showWhereItLeads(link: HTMLAnchorElement): void {
  link.target = '_blank';
  link.rel = 'noopener noreferrer';
  if (!link.hostname || link.textContent.includes(link.hostname)) return;
  const host = document.createElement('span');
  host.className = 'host';
  host.textContent = ` (${link.hostname})`;
  link.append(host);
}
