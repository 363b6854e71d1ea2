/** Tells screen readers an answer in whole sentences, not token by token. */

import { spoken } from "./state";
import type { MessageState } from "./types";

const PAUSE_MS = 2500;
const MOST_LETTERS = 400;
const ENDS: Record<MessageState, string> = {
  streaming: "",
  done: "Answer complete.",
  length: "The answer reached the token limit.",
  stopped: "Answer stopped.",
  interrupted: "Answer interrupted.",
  failed: "Answer failed.",
};

export class Announcer {
  #held = "";
  #last = 0;

  /** Take text; say what is complete, not too often. */
  add(text: string): void {
    this.#held += text;
    const end = Math.max(...[". ", "! ", "? ", "\n"].map((stop) => this.#held.lastIndexOf(stop)));
    const now = performance.now();
    if (end < 0 || now - this.#last < PAUSE_MS) return;
    this.#last = now;
    this.#say(this.#held.slice(0, end + 1));
    this.#held = this.#held.slice(end + 1);
  }

  /** Say the rest and how it ended. */
  end(state: MessageState): void {
    this.#say(`${this.#held} ${ENDS[state]}`);
    this.#held = "";
  }

  #say(text: string): void {
    // Marks of code and tables are noise when they are read out.
    spoken.value = text.replace(/[`*_#|]+/g, "").slice(0, MOST_LETTERS);
  }
}
