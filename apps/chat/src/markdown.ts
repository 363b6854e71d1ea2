/**
 * Renders Markdown to safe HTML.
 *
 * Three layers protect the page from an answer: markdown-it rejects HTML, DOMPurify allows only the
 * tags below, and the server's policy allows only the page's own scripts and requests.
 * Images are never fetched, because an image address could leak the conversation.
 */

import DOMPurify from "dompurify";
import MarkdownIt from "markdown-it";

import { type Masked, mask } from "./formulas";
import { highlight } from "./highlight";

const SAFE_LINK = /^(https?:\/\/|mailto:)/i;
const TAGS =
  "a blockquote br button code div em h3 h4 h5 h6 hr li ol p pre s span strong table tbody td th thead tr ul".split(
    " ",
  );
const ATTRIBUTES = ["class", "href", "rel", "start", "tabindex", "target", "title", "type"];
const MAX_CACHED = 500;

const markdown = new MarkdownIt({ html: false, linkify: true, typographer: false });
const cache = new Map<string, string>();

markdown.linkify.set({ fuzzyLink: false, fuzzyEmail: false });
markdown.validateLink = (url: string) => SAFE_LINK.test(url);

markdown.renderer.rules.image = (tokens, index) => {
  const token = tokens[index]!;
  const source = String(token.attrGet("src") ?? "");
  const label = markdown.utils.escapeHtml(`image: ${token.content || source}`);
  return `<a class="image" href="${markdown.utils.escapeHtml(source)}">${label}</a>`;
};

markdown.renderer.rules.fence = (tokens, index) => {
  const token = tokens[index]!;
  return codeBlock(token.content, token.info.trim().split(/\s+/)[0] ?? "");
};
markdown.renderer.rules.code_block = (tokens, index) => codeBlock(tokens[index]!.content, "");

markdown.renderer.rules.text = (tokens, index, _options, env) =>
  (env as Masked).show(tokens[index]!.content);
// What looked like a formula outside of text is restored.
markdown.core.ruler.push("formulas", ({ tokens, env }) => {
  const masked = env as Masked;
  const restore = (token: (typeof tokens)[number]) => {
    token.children?.forEach(restore);
    if (token.type !== "text" && token.type !== "inline") token.content = masked.restore(token.content);
    token.info = masked.restore(token.info);
    token.attrs?.forEach((attribute) => (attribute[1] = masked.restore(String(attribute[1]))));
  };
  tokens.forEach(restore);
});

// Checkboxes of task lists are characters: a control that does nothing would mislead.
markdown.core.ruler.push("tasks", ({ tokens }) => {
  tokens.forEach((token, index) => {
    const item = tokens[index - 2];
    const box = /^\[([ xX])\] /.exec(token.content)?.[1];
    const first = token.children?.[0];
    if (token.type !== "inline" || item?.type !== "list_item_open" || !box || !first) return;
    first.content = (box === " " ? "☐" : "☑") + first.content.slice(3);
    item.attrSet("class", "task");
  });
});

// Headings of an answer rank below those of the page.
for (const rule of ["heading_open", "heading_close"] as const) {
  markdown.renderer.rules[rule] = (tokens, index, options, _env, self) => {
    const token = tokens[index]!;
    const level = Number(token.tag.slice(1));
    if (level <= 6 && /^h[1-6]$/.test(token.tag)) token.tag = `h${Math.min(level + 2, 6)}`;
    return self.renderToken(tokens, index, options);
  };
}
// The policy forbids style attributes, so alignment becomes a class.
for (const rule of ["th_open", "td_open"] as const) {
  markdown.renderer.rules[rule] = (tokens, index, options, _env, self) => {
    const token = tokens[index]!;
    const align = /text-align:(\w+)/.exec(String(token.attrGet("style") ?? ""))?.[1];
    token.attrs = align ? [["class", `align-${align}`]] : null;
    return self.renderToken(tokens, index, options);
  };
}
markdown.renderer.rules.table_open = () => '<div class="table" tabindex="0"><table>';
markdown.renderer.rules.table_close = () => "</table></div>";

DOMPurify.addHook("afterSanitizeAttributes", (node) => {
  if (node.tagName === "A") {
    node.setAttribute("target", "_blank");
    node.setAttribute("rel", "noopener noreferrer nofollow");
  }
});

/** Render text; returns safe HTML per block, so that unchanged blocks are not rendered again. */
export function renderBlocks(text: string, streaming: boolean): string[] {
  const env = mask(text, streaming, markdown.utils.escapeHtml);
  const tokens = markdown.parse(env.text, env);
  const blocks: string[] = [];
  let start = 0;
  let depth = 0;
  tokens.forEach((token, index) => {
    depth += token.nesting;
    if (depth > 0) return;
    const html = markdown.renderer.render(tokens.slice(start, index + 1), markdown.options, env);
    if (html.trim()) blocks.push(safe(html));
    start = index + 1;
  });
  return blocks;
}

/** Render only the formulas of a text; returns safe HTML per paragraph. */
export function renderPlain(text: string, streaming: boolean): string[] {
  const masked = mask(text, streaming, markdown.utils.escapeHtml);
  return masked.text.split(/\n{2,}/).map((part) => safe(masked.show(part)));
}

function safe(html: string): string {
  let clean = cache.get(html);
  if (clean === undefined) {
    clean = DOMPurify.sanitize(html, {
      ALLOWED_TAGS: TAGS,
      ALLOWED_ATTR: ATTRIBUTES,
      ALLOWED_URI_REGEXP: SAFE_LINK,
      ALLOW_DATA_ATTR: false,
      ALLOW_ARIA_ATTR: false,
    });
    if (cache.size >= MAX_CACHED) cache.delete(cache.keys().next().value!);
    cache.set(html, clean);
  }
  return clean;
}

function codeBlock(code: string, language: string): string {
  const name = markdown.utils.escapeHtml(language.slice(0, 30));
  const head = `<div class="code-head"><span>${name || "text"}</span><button type="button" class="copy">Copy</button></div>`;
  const body = highlight(code, language) ?? markdown.utils.escapeHtml(code);
  return `<div class="code">${head}<pre tabindex="0"><code>${body}</code></pre></div>`;
}
