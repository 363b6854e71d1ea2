/** Actions of the user on conversations, and their effect on the state. */

import { batch } from "@preact/signals";

import { ApiError, address, ask, askText, upload } from "./api";
import { watchAnswer } from "./answers";
import * as state from "./state";
import { newestLeaf } from "./tree";
import type { Conversation, Message, Options, Summary } from "./types";
import { counted } from "./words";

const NOTICE_MS = 6000;
let noticeTimer = 0;
let lastOpened = 0;

/** Run ``work`` and show its error, if any; returns whether it succeeded. */
export async function attempt(work: () => Promise<unknown>): Promise<boolean> {
  try {
    await work();
    return true;
  } catch (error) {
    if (error instanceof ApiError && error.status === 401) state.locked.value = true;
    else if (!state.gone.value) notify(error instanceof Error ? error.message : String(error), true);
    return false;
  }
}

/** Show a notice for a few seconds. */
export function notify(text: string, bad = false): void {
  clearTimeout(noticeTimer);
  state.notice.value = { text, bad };
  noticeTimer = window.setTimeout(() => (state.notice.value = null), NOTICE_MS);
}

/** Load the list of conversations that match the search. */
export async function listConversations(): Promise<void> {
  const query = state.search.value;
  const summaries = await ask<Summary[]>("GET", `/conversations?search=${encodeURIComponent(query)}`);
  if (query === state.search.value) state.summaries.value = summaries;
}

/** Show a conversation, and follow its answer if one is being generated. */
export async function openConversation(id: number): Promise<void> {
  const opened = ++lastOpened;
  const { messages, ...head } = await ask<Conversation>("GET", `/conversations/${id}`);
  if (opened !== lastOpened) return; // another one was opened while this one was read
  batch(() => {
    state.conversation.value = head;
    state.messages.value = new Map(messages.map((message) => [message.id, message]));
    state.editing.value = null;
    state.drawer.value = false;
  });
  goTo(`#c=${id}`);
  for (const message of messages) if (message.state === "streaming") void watchAnswer(message.id);
}

/** Start a new conversation; it is saved with its first message. */
export function newConversation(): void {
  lastOpened++;
  batch(() => {
    state.conversation.value = null;
    state.messages.value = new Map();
    state.editing.value = null;
    state.drawer.value = false;
    state.draft.value = structuredClone(state.settings.value.defaults);
  });
  goTo("#");
}

/** Record the shown conversation in the address, so that the browser's Back returns to it. */
function goTo(hash: string): void {
  if ((location.hash || "#") !== hash) history.pushState(null, "", hash);
}

/** Send a message after the last one shown, or after ``parent``. */
export async function sendMessage(text: string, parent?: number | null): Promise<boolean> {
  return attempt(async () => {
    const last = state.shown.value.at(-1);
    const previous = parent === undefined ? (last?.id ?? null) : parent;
    if (!state.conversation.value) await save();
    await answer(previous, text);
  });
}

/** Answer a message of the user once more; the other answers are kept. */
export async function regenerate(message: Message): Promise<void> {
  const question = message.role === "user" ? message.id : message.parent;
  if (question !== null) await attempt(() => answer(question));
}

/** Add a new version of a message, and answer it. */
export async function edit(message: Message, text: string): Promise<void> {
  if (await sendMessage(text, message.parent)) state.editing.value = null;
}

/** Stop the answer that is being generated. */
export async function stop(): Promise<void> {
  const running = state.answering.value;
  if (running) await attempt(() => ask("POST", `/answers/${running.id}/stop`));
}

/** Show another branch. */
export async function chooseBranch(message: Message): Promise<void> {
  const shown = state.conversation.value;
  if (!shown) return;
  const leaf = newestLeaf(state.messages.value, message.id);
  state.conversation.value = { ...shown, leaf };
  await attempt(() => ask("PATCH", `/conversations/${shown.id}`, { leaf }));
}

/** Rename a conversation. */
export async function rename(id: number, title: string): Promise<void> {
  await attempt(async () => {
    await ask("PATCH", `/conversations/${id}`, { title });
    const shown = state.conversation.value;
    if (shown?.id === id) state.conversation.value = { ...shown, title };
    await listConversations();
  });
}

/** Delete a conversation permanently. */
export async function remove(id: number): Promise<void> {
  await attempt(async () => {
    await ask("DELETE", `/conversations/${id}`);
    if (state.conversation.value?.id === id) newConversation();
    await listConversations();
    notify("Conversation deleted");
  });
}

/** Change the system prompt or the options of the conversation that is shown. */
export async function change(values: {
  system_prompt?: string;
  options?: Options;
}): Promise<void> {
  const shown = state.conversation.value;
  if (!shown) {
    state.draft.value = { ...state.draft.value, ...values };
    return;
  }
  state.conversation.value = { ...shown, ...values };
  await attempt(() => ask("PATCH", `/conversations/${shown.id}`, values));
}

/** Save settings of the page. */
export async function remember(values: Partial<state.Settings>): Promise<void> {
  state.settings.value = { ...state.settings.value, ...values };
  await attempt(() => ask("PUT", "/settings", { values }));
}

/** Download one conversation, or all of them for null. */
export function download(id: number | null, format: "json" | "markdown"): void {
  const link = document.createElement("a");
  link.href = address(id === null ? "/export" : `/conversations/${id}/export?format=${format}`);
  link.download = "";
  link.click();
}

/** Copy text to the clipboard. */
export async function copy(text: string): Promise<void> {
  await attempt(async () => {
    await navigator.clipboard.writeText(text);
    notify("Copied");
  });
}

/** Copy a conversation to the clipboard as Markdown. */
export async function copyMarkdown(id: number): Promise<void> {
  await attempt(async () => {
    // A promise, because Safari loses the click's permission while the text is awaited.
    const markdown = askText(`/conversations/${id}/export?format=markdown`);
    const blob = markdown.then((text) => new Blob([text], { type: "text/plain" }));
    await navigator.clipboard.write([new ClipboardItem({ "text/plain": blob })]);
    notify("Copied");
  });
}

/** Import conversations from a file. */
export async function importFile(file: File): Promise<void> {
  await attempt(async () => {
    const added = await upload<{ conversations: number[] }>("/import", file);
    await listConversations();
    const first = added.conversations[0];
    if (first !== undefined) await openConversation(first);
    const count = added.conversations.length;
    notify(`${counted(count, "conversation")} imported`);
  });
}

async function save(): Promise<void> {
  const { messages, ...head } = await ask<Conversation>("POST", "/conversations", {
    ...state.draft.value,
  });
  state.conversation.value = head;
  state.messages.value = new Map(messages.map((message) => [message.id, message]));
  history.replaceState(null, "", `#c=${head.id}`);
}

async function answer(parent: number | null, text?: string): Promise<void> {
  const shown = state.conversation.value;
  if (!shown) return;
  const body = text === undefined ? { parent } : { parent, text };
  const path = `/conversations/${shown.id}/answer`;
  const { messages } = await ask<{ messages: Message[] }>("POST", path, body);
  const last = messages.at(-1)!;
  batch(() => {
    state.messages.value = new Map([
      ...state.messages.value,
      ...messages.map((message) => [message.id, message] as const),
    ]);
    state.conversation.value = { ...shown, leaf: last.id };
  });
  void watchAnswer(last.id);
  await listConversations();
  const title = state.summaries.value.find((summary) => summary.id === shown.id)?.title;
  const current = state.conversation.value;
  if (title && current?.id === shown.id) state.conversation.value = { ...current, title };
}
