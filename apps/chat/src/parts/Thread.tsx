import { useSignalEffect } from "@preact/signals";
import { useRef } from "preact/hooks";

import * as state from "../state";
import { counted } from "../words";
import { MessageView } from "./MessageView";

const NEAR_PX = 80;

/** The branch that is shown. */
export function Thread() {
  const box = useRef<HTMLDivElement>(null);
  const follows = useRef(true);
  useSignalEffect(() => {
    const [, last] = [state.conversation.value?.id, state.shown.value.at(-1)];
    if (last?.role === "assistant" && last.text === "") follows.current = true;
    requestAnimationFrame(() => {
      if (follows.current) box.current?.scrollTo({ top: box.current.scrollHeight });
    });
  });
  return (
    <div
      class="thread"
      ref={box}
      tabIndex={0}
      role="region"
      aria-label="Messages"
      onScroll={(event) => {
        const { scrollHeight, scrollTop, clientHeight } = event.currentTarget;
        follows.current = scrollHeight - scrollTop - clientHeight < NEAR_PX;
      }}
      onClick={copyCode}
    >
      {state.shown.value.map((each) => (
        <MessageView key={each.id} message={each} />
      ))}
      {!state.shown.value.length && <Empty />}
    </div>
  );
}

function Empty() {
  const model = state.model.value;
  return (
    <div class="empty">
      <p>
        {model
          ? model.adapter
            ? `${model.name} drafts up to ${counted(model.num_draft_tokens, "token")} a step. What it says is what it would say one token at a time.`
            : `${model.name} has no adapter: it says one token a step.`
          : "The model is being loaded."}
      </p>
      {model && !model.has_chat_template && (
        <p class="bad">This model has no chat template, so it cannot hold a conversation.</p>
      )}
    </div>
  );
}

async function copyCode(event: MouseEvent): Promise<void> {
  const button = (event.target as HTMLElement).closest<HTMLButtonElement>("button.copy");
  const code = button?.closest(".code")?.querySelector("code")?.textContent;
  if (!button || code === undefined || code === null) return;
  await navigator.clipboard.writeText(code);
  button.textContent = "Copied";
  state.spoken.value = "Code copied";
  setTimeout(() => (button.textContent = "Copy"), 1500);
}
