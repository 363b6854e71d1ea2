import { useEffect, useRef } from "preact/hooks";

import { sendMessage, stop } from "../actions";
import * as state from "../state";
import { isComposing } from "./shortcuts";

/** The message box. */
export function Composer() {
  const box = useRef<HTMLTextAreaElement>(null);
  const busy = state.busy.value;
  useEffect(() => box.current?.focus(), [state.conversation.value?.id]);
  const send = async () => {
    const text = box.current!.value;
    if (!text.trim() || busy || !state.ready.value) return;
    box.current!.value = "";
    fit(box.current!);
    if (!(await sendMessage(text)) && !box.current!.value) box.current!.value = text;
  };
  return (
    <form
      class="composer"
      onSubmit={(event) => {
        event.preventDefault();
        void send();
      }}
    >
      <textarea
        id="composer"
        ref={box}
        rows={1}
        placeholder={placeholder()}
        dir="auto"
        aria-label="Message"
        onInput={(event) => fit(event.currentTarget)}
        onKeyDown={(event) => {
          if (event.key === "Enter" && !event.shiftKey && !isComposing(event)) {
            event.preventDefault();
            void send();
          } else if (event.key === "ArrowUp" && !event.currentTarget.value) editLast(event);
        }}
      />
      {busy ? (
        <button type="button" class="primary" onClick={() => void stop()}>
          Stop
        </button>
      ) : (
        <button type="submit" class="primary" disabled={!state.ready.value}>
          Send
        </button>
      )}
    </form>
  );
}

function placeholder(): string {
  if (state.gone.value) return "mlx-mtp app is not responding";
  if (state.ready.value) return "Write a message";
  return state.engine.value?.state === "broken" ? "No model is loaded" : "The model is loading";
}

function editLast(event: KeyboardEvent): void {
  const last = state.shown.value.findLast((message) => message.role === "user");
  if (!last || state.busy.value) return;
  event.preventDefault();
  state.editing.value = last.id;
}

/** Fit the height of a text box to its text. */
export function fit(box: HTMLTextAreaElement): void {
  box.style.height = "auto";
  box.style.height = `${Math.min(box.scrollHeight + 2, innerHeight * 0.4)}px`;
}
