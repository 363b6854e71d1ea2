/** A conversation is a tree of messages; the page shows the branch from the root to one leaf. */

import type { Message } from "./types";

export type Messages = ReadonlyMap<number, Message>;

/** The messages from the first one to a leaf. */
export function branch(messages: Messages, leaf: number | null): Message[] {
  const path: Message[] = [];
  for (let id = leaf; id !== null; ) {
    const message = messages.get(id);
    if (!message) break;
    path.push(message);
    id = message.parent;
  }
  return path.reverse();
}

/** Ids of the replies to every message, oldest first; null has the first messages. */
export function siblings(messages: Messages): Map<number | null, number[]> {
  const replies = new Map<number | null, number[]>();
  for (const { id, parent } of messages.values()) {
    const others = replies.get(parent);
    if (others) others.push(id);
    else replies.set(parent, [id]);
  }
  return replies;
}

/** The leaf reached from a message by always following the newest reply. */
export function newestLeaf(messages: Messages, from: number): number {
  let leaf = from;
  for (;;) {
    const children = [...messages.values()].filter((message) => message.parent === leaf);
    if (!children.length) return leaf;
    leaf = Math.max(...children.map((message) => message.id));
  }
}
