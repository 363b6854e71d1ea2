/** The state of the page.  Components read these signals; only actions change them. */

import { computed, signal } from "@preact/signals";

import { branch, siblings } from "./tree";
import type {
  Conversation,
  EngineState,
  Facts,
  Message,
  ModelInfo,
  Options,
  Summary,
} from "./types";

export type Theme = "system" | "light" | "dark";
export type Panel = "" | "settings" | "steps" | "model";

/** Settings that are saved between launches. */
export interface Settings {
  theme: Theme;
  /** Whether the steps of answers are underlined. */
  marks: boolean;
  panel: Panel;
  /** System prompt and options of new conversations. */
  defaults: { system_prompt: string; options: Options };
}

export const FIRST_SETTINGS: Settings = {
  theme: "system",
  marks: true,
  panel: "",
  defaults: { system_prompt: "", options: {} },
};

export const locked = signal(false);
/** Whether the server has stopped responding. */
export const gone = signal(false);
export const settings = signal<Settings>(FIRST_SETTINGS);
export const engine = signal<EngineState | null>(null);
export const facts = signal<Facts | null>(null);

export const summaries = signal<Summary[]>([]);
export const search = signal("");

/** The conversation that is shown; null is a new one that has not been saved yet. */
export const conversation = signal<Omit<Conversation, "messages"> | null>(null);
export const messages = signal<ReadonlyMap<number, Message>>(new Map());
/** The system prompt and options of a conversation that has not been saved yet. */
export const draft = signal<{ system_prompt: string; options: Options }>({
  system_prompt: "",
  options: {},
});

export const editing = signal<number | null>(null);
export const racing = signal(false);
export const helping = signal(false);
export const drawer = signal(false);

/** A notice that is shown for a few seconds: an error, or a completed action. */
export const notice = signal<{ text: string; bad: boolean } | null>(null);
/** Text for screen readers. */
export const spoken = signal("");
/** Status of an answer before its first token. */
export const waiting = signal("");

export const shown = computed(() => branch(messages.value, conversation.value?.leaf ?? null));
/** Alternative messages by parent, oldest first. */
export const versions = computed(() => siblings(messages.value));
export const answering = computed(() => shown.value.find((message) => message.state === "streaming"));
/** Whether an answer is being generated; unlike ``answering``, it does not change with every step. */
export const busy = computed(() => answering.value !== undefined);
export const model = computed<ModelInfo | null>(() => engine.value?.model ?? null);
export const ready = computed(() => engine.value?.state === "ok" && !gone.value);
/** The model's name without its publisher or folder. */
export const modelName = computed(() => model.value?.name.split(/[\\/]/).filter(Boolean).at(-1) ?? "");

/** Options that apply to the next answer. */
export const options = computed<Options>(
  () => conversation.value?.options ?? draft.value.options,
);
export const systemPrompt = computed(
  () => conversation.value?.system_prompt ?? draft.value.system_prompt,
);

/** The answer whose steps are shown in the panel: the latest one. */
export const observed = computed<Message | undefined>(() =>
  shown.value.findLast((message) => message.role === "assistant"),
);
