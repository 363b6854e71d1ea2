/**
 * Finds the formulas of an answer, protects them from Markdown, and renders them with KaTeX.
 *
 * Before parsing, ``mask`` replaces every formula by a mark that Markdown keeps as it is; then ``show`` replaces
 * the marks by spans with the formulas' sources, and ``typeset`` renders those in the document.
 */

import { signal } from "@preact/signals";
import DOMPurify from "dompurify";

/** Longer formulas are shown as their source. */
const MAX_CHARACTERS = 5000;
const MAX_CACHED = 500;
const OPTIONS = {
  throwOnError: true,
  strict: false,
  maxSize: 50,
  maxExpand: 1000,
  /** Called for links, pictures and attributes; a result of false would omit them. */
  trust: ({ command }: { command: string }): boolean => {
    throw new Error(`${command} is not rendered.`);
  },
};
const ENVIRONMENT = String.raw`(?:equation|align(?:at|ed)?|gather(?:ed)?|multline|eqnarray|split|cases|array|[pbBvV]?matrix|CD)\*?`;
const LENGTH = `{0,${MAX_CHARACTERS}}?`;
/** A line break that ends no paragraph; in a formula within ``$`` it also begins no list, quote, table or heading. */
const BREAK = String.raw`\n(?![ \t>]*(?:\n|$(?![\s\S])))`;
const PLAIN_BREAK = String.raw`\n(?![ \t]*(?:\n|[-+*#>|~]|\x60{3}|\d+[.)]))`;
/** Everything that is not searched for formulas comes before them: code, addresses and escaped characters. */
const PATTERN = new RegExp(
  [
    String.raw`^(?<lead>[ \t>]*(?:(?:[-*+]|\d{1,9}[.)])[ \t]+)*)(?<fence>(?<tick>[\x60~])\k<tick>{2,})(?<info>[^\x60\n]*)$[\s\S]*?(?:(?<closed>\n[ \t>]*\k<fence>\k<tick>*[ \t]*$)|$(?![\s\S]))`,
    String.raw`(?<code>\x60+)(?:[^\x60\n]|(?!\k<code>(?!\x60))\x60+|${BREAK})*?\k<code>(?!\x60)|\x60+`,
    String.raw`https?:\/\/[^\s)>\x80-\uffff]+`,
    String.raw`(?<formula>${[
      String.raw`\$\$[ \t]*\n(?:\\[\s\S]|[^\\$]|\$(?!\$))${LENGTH}\n[ \t>]*\$\$`,
      String.raw`\$\$(?:\\[\s\S]|[^\\$\n]|\$(?!\$)|${BREAK})${LENGTH}\$\$`,
      String.raw`\\\[[ \t]*\n(?:\\[^[\]]|[^\\])${LENGTH}\n[ \t>]*\\\]`,
      String.raw`\\\[(?:\\[^[\]]|[^\\\n]|${BREAK})${LENGTH}\\\]`,
      String.raw`\\\((?:\\[^()]|[^\\\n]|${BREAK})${LENGTH}\\\)`,
      String.raw`\\begin\{(?<name>${ENVIRONMENT})\}[\s\S]${LENGTH}\\end\{\k<name>\}`,
      String.raw`(?<![A-Za-z0-9$])(?<dollar>\$)(?![\s$])(?:\\[\s\S]|[^\\$\n\x60]|${PLAIN_BREAK})${LENGTH}(?<!\s)\$(?![\dA-Z_{$])`,
    ].join("|")})`,
    String.raw`(?<open>(?:\$\$|\\[([]|\\begin\{${ENVIRONMENT}\})(?:\\[^([\n]|[^\\\n$]|\\?\$(?!\$)|${BREAK}){0,${MAX_CHARACTERS}}\\?\$?\n?$(?![\s\S]))`,
    String.raw`(?<![A-Za-z0-9$])(?<started>\$(?![\s\d$])(?:\\[^([\n]|[^\\$\n]){0,200}\\?\$?$(?![\s\S]))`,
    String.raw`\\[\s\S]`,
  ].join("|"),
  "gm",
);
const DELIMITERS = /^(?:\$\$?|\\[([]|(?:`{3,}|~{3,})[^\n]*\n)([\s\S]*?)(?:\$\$?|\\[)\]]|\n[ \t>]*(?:`{3,}|~{3,})[ \t]*)$/;

type Render = typeof import("./katex").renderToString;
let render: Render | undefined;
let loading: Promise<void> | undefined;
const cache = new Map<string, Node>();

/** Whether KaTeX is loaded. */
export const ready = signal(false);

export type Masked = {
  text: string;
  /** Replace the marks in a text by the sources. */
  restore(text: string): string;
  /** Escape a text as HTML, with its formulas in spans. */
  show(text: string): string;
};

/** Replace the formulas in a text by marks; while it streams, a formula may have no end yet. */
export function mask(original: string, streaming: boolean, escape: (text: string) => string): Masked {
  const text = original.replace(/\r\n?/g, "\n");
  const sources: { source: string; kind: string }[] = [];
  // Markdown takes the first for a letter and the second for punctuation.
  const mark = unused(text, 0xe000);
  const edge = unused(text, 0x2800);
  const masked = text.replace(PATTERN, (whole: string, ...rest) => {
    const { lead = "", info, closed, formula, dollar, open, started } = rest.at(-1) as Record<string, string>;
    const offset = rest.at(-3) as number;
    const end = offset + whole.length;
    const hide = (source: string, kind: string) => {
      // Next to a letter Markdown ends no emphasis after punctuation, as in **Note:**$x$, and begins none before it.
      const left = /(?![*_~])[\p{P}\p{S}](?:\*+|_+|~~)$/u.test(text.slice(Math.max(0, offset - 6), offset)) ? edge : "";
      const right = /^(?:\*+|_+|~~)(?![*_~])[\p{P}\p{S}]/u.test(text.slice(end, end + 6)) ? edge : "";
      return `${left}${mark}${sources.push({ source, kind }) - 1}${mark}${right}`;
    };
    // The next character decides whether the last dollar closes a formula.
    const undecided = streaming && (started || (dollar && end === text.length));
    if (open || undecided) return hide(whole, "source");
    if (closed && info?.trim() === "math") return lead + hide(unquoted(whole, lead).slice(lead.length), "math display");
    if (!formula) return whole;
    const before = text.slice(text.lastIndexOf("\n", offset - 1) + 1, offset);
    return hide(unquoted(whole, before), /^(\\\(|\$[^$])/.test(whole) ? "math" : "math display");
  });
  const each = new RegExp(`${edge}?${mark}(\\d+)${mark}${edge}?`, "g");
  return {
    text: masked,
    restore: (part) => part.replace(each, (_, index) => sources[index]!.source),
    show: (part) =>
      escape(part).replace(each, (_, index) => {
        const { source, kind } = sources[index]!;
        return `<span class="${kind}"${kind === "math display" ? ' tabindex="0"' : ""}>${escape(source)}</span>`;
      }),
  };
}

/** The first character from a code point on that a text does not contain. */
function unused(text: string, code: number): string {
  while (text.includes(String.fromCharCode(code))) code += 1;
  return String.fromCharCode(code);
}

/** Remove the marks of a blockquote from the later lines of a formula. */
function unquoted(source: string, before: string): string {
  return before.includes(">") ? source.replace(/\n[ \t]*(?:>[ \t]?)+/g, "\n") : source;
}

/** Render the formulas below an element; load KaTeX first if there is one. */
export function typeset(root: HTMLElement): void {
  const spans = root.querySelectorAll<HTMLElement>(".math:not(.done)");
  if (!spans.length) return;
  if (!render) return void (loading ??= load());
  for (const span of spans) {
    span.classList.add("done");
    const source = span.textContent!;
    try {
      span.replaceChildren(formula(source, span.classList.contains("display"), render).cloneNode(true));
    } catch (error) {
      span.classList.add("failed");
      span.title = String((error as Error).message);
    }
  }
}

async function load(): Promise<void> {
  try {
    render = (await import("./katex")).renderToString;
    ready.value = true;
  } catch {
    loading = undefined; // The sources stay visible; the next formula tries again.
  }
}

function formula(source: string, displayMode: boolean, render: Render): Node {
  let node = cache.get(source);
  if (!node) {
    if (source.length > MAX_CHARACTERS + 100) throw new Error("The formula is too long.");
    const html = render(DELIMITERS.exec(source)?.[1] ?? source, { ...OPTIONS, displayMode });
    // The policy forbids style attributes, but not to set the same properties.
    node = DOMPurify.sanitize(html.replaceAll(' style="', ' data-style="'), {
      USE_PROFILES: { html: true, mathMl: true, svg: true },
      ADD_TAGS: ["annotation", "semantics"],
      FORBID_TAGS: ["a", "audio", "form", "image", "img", "input", "picture", "source", "style", "video"],
      FORBID_ATTR: ["href", "src", "srcset", "style"],
      RETURN_DOM_FRAGMENT: true,
    });
    for (const each of (node as DocumentFragment).querySelectorAll<HTMLElement>("[data-style]")) {
      each.style.cssText = each.dataset.style!;
      delete each.dataset.style;
    }
    if (cache.size >= MAX_CACHED) cache.delete(cache.keys().next().value!);
    cache.set(source, node);
  }
  return node;
}
