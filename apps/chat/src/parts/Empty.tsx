import { sendMessage } from "../actions";
import * as state from "../state";
import { counted } from "../words";
import { focusOn } from "./shortcuts";

/** Example prompts; code and repetition benefit most from several tokens per step. */
export const SUGGESTIONS = [
  "Write a Python function that reverses a string, and explain it.",
  "Explain in simple words why the sky is blue.",
  "Write a short story about a lighthouse keeper.",
];

/** Placeholder for a conversation without messages. */
export function Empty() {
  const model = state.model.value;
  if (!model) return <Loading />;
  return (
    <div class="empty">
      <h2>Chat with {state.modelName.value}</h2>
      {model.adapter ? (
        <p>
          Generates up to {counted(model.num_draft_tokens + 1, "token")} per step. The text is the same as with
          one token per step. Tokens of one step share an underline; point at a token to see its origin.
        </p>
      ) : (
        <p>This model has no adapter, so it generates one token per step.</p>
      )}
      {model.has_chat_template ? (
        <ul class="suggestions">
          {SUGGESTIONS.map((text) => (
            <li key={text}>
              <button type="button" disabled={!state.ready.value} onClick={() => ask(text)}>
                {text}
              </button>
            </li>
          ))}
        </ul>
      ) : (
        <p class="bad">This model has no chat template, so it cannot be used for chat.</p>
      )}
    </div>
  );
}

function Loading() {
  const broken = state.engine.value?.state === "broken";
  return (
    <div class="empty">
      <p class={broken ? "bad" : ""}>
        {broken ? state.engine.value!.error || "No model is loaded." : "The model is loading."}
      </p>
    </div>
  );
}

function ask(text: string): void {
  focusOn("#composer");
  void sendMessage(text);
}
