/** Messages of the server; see apps/history/store.py and apps/chat_app. */

/** One step: the texts of its tokens, and its draft counts. */
export interface Group {
  tokens: string[];
  accepted: number;
  drafted: number;
  source: string;
  ms: number;
  /** Where the reasoning is in the text so far, if that has changed; see reasoning.ts. */
  span?: [number, number] | [number, number, number, number];
}

export type MessageState = "streaming" | "done" | "length" | "stopped" | "interrupted" | "failed";

export interface Message {
  id: number;
  conversation: number;
  parent: number | null;
  role: "user" | "assistant";
  text: string;
  groups: Group[];
  state: MessageState;
  stats: { error?: string; generation_tps?: number; [name: string]: unknown };
  model: string;
  created: number;
}

export interface Options {
  temp?: number;
  top_p?: number;
  top_k?: number;
  min_p?: number;
  repetition_penalty?: number | null;
  max_tokens?: number;
  seed?: number | null;
  thinking_budget?: number | null;
  layout?: Layout;
  num_draft_tokens?: number | null;
}

export type Layout = "auto" | "tree" | "linear" | "quadratic" | "plain";

export interface Summary {
  id: number;
  title: string;
  created: number;
  updated: number;
  snippet?: string;
}

export interface Conversation extends Summary {
  system_prompt: string;
  options: Options;
  leaf: number | null;
  messages: Message[];
}

export interface ModelInfo {
  name: string;
  adapter: boolean;
  /** What proposes draft tokens by default, such as mask or lookup. */
  drafters: string[];
  num_draft_tokens: number;
  max_context: number | null;
  has_chat_template: boolean;
}

export interface EngineState {
  version: string;
  state: "loading" | "ok" | "restarting" | "broken" | "stopped";
  error: string;
  chosen: { model: string | null; adapter_path: string | null };
  model: ModelInfo | null;
}

export interface Costs {
  rows: number[];
  contexts: number[];
  forward_ms: number[][];
  draft_ms: number[];
  source: string;
}

export interface Facts {
  device: string;
  runs_on: string;
  blas: string;
  costs: Costs;
  measured: boolean;
  num_draft_tokens: number;
}

export type AnswerEvent =
  | { type: "started"; prompt_tokens: number; cached_tokens: number }
  | { type: "prefill"; done: number }
  | ({ type: "group" } & Group)
  | { type: "end"; state: MessageState; stats: Message["stats"] };

export type Lane = "plain" | "mtp";

export interface LaneEnd {
  lane: Lane;
  tokens: number;
  steps: number;
  seconds: number;
  timed_tokens: number;
  sha256: string;
  reason: string;
}

export interface Verdict {
  identical: boolean;
  differs_at: number | null;
  speed_up: number | null;
  plain_tps: number;
  mtp_tps: number;
  /** Other answers that used the model while the race was timed. */
  others: number;
}

export type RaceEvent =
  | { type: "lane"; lane: Lane | "warm-up" }
  | ({ type: "group"; lane: Lane } & Group)
  | ({ type: "lane_end" } & LaneEnd)
  | ({ type: "result" } & Verdict)
  | { type: "error"; message: string };
