/** A conversation is a tree of messages; shown is the branch from the root to a leaf. */

import type { Message } from "./types";

export type Messages = ReadonlyMap<number, Message>;

/** The messages from the first one to a leaf. */
export function branch(messages: Messages, leaf: number | null): Message[] {
  const path: Message[] = [];
  for (let at = leaf; at !== null; ) {
    const message = messages.get(at);
    if (!message) break;
    path.push(message);
    at = message.parent;
  }
  return path.reverse();
}

/** Numbers of the messages behind each message, oldest first; behind null those that begin. */
export function siblings(messages: Messages): Map<number | null, number[]> {
  const found = new Map<number | null, number[]>();
  for (const { id, parent } of messages.values()) {
    const others = found.get(parent);
    if (others) others.push(id);
    else found.set(parent, [id]);
  }
  return found;
}

/** The leaf that is reached from a message by always taking the newest answer. */
export function newestLeaf(messages: Messages, from: number): number {
  let at = from;
  for (;;) {
    const children = [...messages.values()].filter((each) => each.parent === at);
    if (!children.length) return at;
    at = Math.max(...children.map((each) => each.id));
  }
}
