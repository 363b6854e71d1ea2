import { useState } from "preact/hooks";

import { chooseBranch, edit, regenerate, say } from "../actions";
import * as state from "../state";
import { summarise } from "../steps";
import { siblings } from "../tree";
import type { Message, MessageState } from "../types";
import { counted } from "../words";
import { Answer } from "./Answer";
import { fit } from "./Composer";
import { StepList } from "./StepList";
import { focusOn } from "./shortcuts";

const ENDS: Record<MessageState, string> = {
  streaming: "",
  done: "",
  length: "cut at the limit",
  stopped: "stopped",
  interrupted: "interrupted",
  failed: "failed",
};

/** One message with what can be done to it. */
export function MessageView({ message }: { message: Message }) {
  const [listed, setListed] = useState(false);
  const mine = message.role === "user";
  if (mine && state.editing.value === message.id) return <Editor message={message} />;
  return (
    <article class={`message ${message.role}`} aria-label={mine ? "You" : "Assistant"}>
      <Body message={message} listed={listed} />
      {message.state !== "streaming" && (
        <footer>
          <Versions message={message} />
          <button type="button" class="quiet small" onClick={() => void copy(message.text)}>
            Copy
          </button>
          {mine ? (
            <button
              type="button"
              class="quiet small"
              disabled={!!state.answering.value}
              onClick={() => (state.editing.value = message.id)}
            >
              Edit
            </button>
          ) : (
            <AnswerTools message={message} listed={listed} toggle={() => setListed(!listed)} />
          )}
        </footer>
      )}
    </article>
  );
}

function Body({ message, listed }: { message: Message; listed: boolean }) {
  if (message.role === "user") return <div class="text plain">{message.text}</div>;
  return (
    <>
      {message.text === "" && message.state === "streaming" && (
        <p class="muted waiting">{state.waiting.value || "Waiting"}</p>
      )}
      {listed ? <StepList groups={message.groups} name={String(message.id)} /> : <Answer message={message} />}
      {message.stats.error && <p class="bad">{message.stats.error}</p>}
    </>
  );
}

function AnswerTools(props: { message: Message; listed: boolean; toggle: () => void }) {
  const { message } = props;
  const summary = summarise(message.groups);
  return (
    <>
      <button
        type="button"
        class="quiet small"
        disabled={!!state.answering.value || !state.ready.value}
        onClick={() => void regenerate(message)}
      >
        Again
      </button>
      {summary.steps > 0 && (
        <button
          type="button"
          class="quiet small"
          aria-pressed={props.listed}
          onClick={props.toggle}
        >
          Steps
        </button>
      )}
      <span class="muted facts">
        {summary.steps > 0 &&
          `${counted(summary.tokens, "token")}, ${summary.tokensPerStep.toFixed(2)} a step, ${summary.tokensPerSecond.toFixed(1)} a second`}
        {ENDS[message.state] && `${summary.steps ? ", " : ""}${ENDS[message.state]}`}
      </span>
    </>
  );
}

function Versions({ message }: { message: Message }) {
  const all = siblings(state.messages.value, message);
  if (all.length < 2) return null;
  const at = all.findIndex((each) => each.id === message.id);
  const go = (step: number) => {
    const next = all[at + step];
    if (next) void chooseBranch(next);
  };
  const busy = !!state.answering.value;
  return (
    <span class="versions" role="group" aria-label="Versions">
      <button
        type="button"
        class="quiet small"
        aria-label="Earlier version"
        disabled={busy || at === 0}
        onClick={() => go(-1)}
      >
        ‹
      </button>
      <span>
        {at + 1}/{all.length}
      </span>
      <button
        type="button"
        class="quiet small"
        aria-label="Later version"
        disabled={busy || at === all.length - 1}
        onClick={() => go(1)}
      >
        ›
      </button>
    </span>
  );
}

function Editor({ message }: { message: Message }) {
  const [text, setText] = useState(message.text);
  const send = async () => {
    if (!text.trim()) return;
    await edit(message, text);
    focusOn("#composer");
  };
  return (
    <form
      class="message user editor"
      onSubmit={(event) => {
        event.preventDefault();
        void send();
      }}
    >
      <textarea
        ref={(box) => {
          if (box && document.activeElement !== box && !box.dataset.seen) {
            box.dataset.seen = "yes";
            box.focus();
            fit(box);
          }
        }}
        aria-label="Edit your message"
        value={text}
        onInput={(event) => {
          setText(event.currentTarget.value);
          fit(event.currentTarget);
        }}
        onKeyDown={(event) => {
          if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
            event.preventDefault();
            void send();
          }
        }}
      />
      <div class="row">
        <button type="submit" class="primary" disabled={!state.ready.value}>
          Send as a new branch
        </button>
        <button type="button" onClick={() => (state.editing.value = null)}>
          Cancel
        </button>
      </div>
    </form>
  );
}

async function copy(text: string): Promise<void> {
  await navigator.clipboard.writeText(text);
  say("Copied");
}
