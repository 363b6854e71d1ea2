/** Announces an answer to screen readers in whole sentences, not token by token. */

import { spoken } from "./state";
import type { MessageState } from "./types";

const PAUSE_MS = 2500;
const MAX_CHARACTERS = 400;
const ENDS: Record<MessageState, string> = {
  streaming: "",
  done: "Answer complete.",
  length: "The answer reached the token limit.",
  stopped: "Answer stopped.",
  interrupted: "Answer interrupted.",
  failed: "Answer failed.",
};

export class Announcer {
  #pending = "";
  #last = 0;

  /** Add text; announce complete sentences, at most once per ``PAUSE_MS``. */
  add(text: string): void {
    this.#pending += text;
    const end = Math.max(...[". ", "! ", "? ", "\n"].map((stop) => this.#pending.lastIndexOf(stop)));
    const now = performance.now();
    if (end < 0 || now - this.#last < PAUSE_MS) return;
    this.#last = now;
    this.#announce(this.#pending.slice(0, end + 1));
    this.#pending = this.#pending.slice(end + 1);
  }

  /** Announce the remaining text and how the answer ended. */
  end(state: MessageState): void {
    this.#announce(`${this.#pending} ${ENDS[state]}`);
    this.#pending = "";
  }

  #announce(text: string): void {
    // Markdown's code and table marks are noise when read aloud.
    spoken.value = text.replace(/[`*_#|]+/g, "").slice(0, MAX_CHARACTERS);
  }
}
