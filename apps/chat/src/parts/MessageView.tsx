import { useState } from "preact/hooks";

import { chooseBranch, copy, edit, regenerate } from "../actions";
import { splitReasoning } from "../reasoning";
import * as state from "../state";
import { summarise } from "../steps";
import type { Message, MessageState } from "../types";
import { counted } from "../words";
import { Answer } from "./Answer";
import { fit } from "./Composer";
import { StepList } from "./StepList";
import { focusOn, isComposing, leaveEditing } from "./shortcuts";

const ENDS: Record<MessageState, string> = {
  streaming: "",
  done: "",
  length: "token limit reached",
  stopped: "stopped",
  interrupted: "interrupted",
  failed: "failed",
};

/** Longer messages of the user are folded. */
const FOLDED_CHARACTERS = 3000;

/** One message with its buttons; ``versions`` are the ids of it and its alternatives. */
export function MessageView({ message, versions }: { message: Message; versions: readonly number[] }) {
  const [listed, setListed] = useState(false);
  const mine = message.role === "user";
  if (mine && state.editing.value === message.id) return <Editor message={message} />;
  return (
    <article
      id={`message-${message.id}`}
      class={`message ${message.role}`}
      aria-label={mine ? "You" : "Assistant"}
    >
      <Body message={message} listed={listed} />
      {message.state === "streaming" ? (
        <footer>
          <Progress message={message} />
        </footer>
      ) : (
        <footer>
          <Versions id={message.id} all={versions} />
          <button type="button" class="quiet small" onClick={() => void copy(splitReasoning(message).content)}>
            Copy
          </button>
          {mine ? (
            <button
              type="button"
              class="quiet small edit"
              disabled={state.busy.value}
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
  if (message.role === "user") return <UserText text={message.text} />;
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

/** A message of the user; long ones are folded. */
function UserText({ text }: { text: string }) {
  const [whole, setWhole] = useState(false);
  const long = text.length > FOLDED_CHARACTERS;
  return (
    <>
      <div class={long && !whole ? "text plain folded" : "text plain"}>{text}</div>
      {long && (
        <button
          type="button"
          class="quiet small unfold"
          aria-expanded={whole}
          onClick={() => setWhole(!whole)}
        >
          {whole ? "Show less" : `Show all ${text.length.toLocaleString("en")} characters`}
        </button>
      )}
    </>
  );
}

/** Progress of an answer that is being generated. */
function Progress({ message }: { message: Message }) {
  const { steps, tokens, tokensPerStep } = summarise(message.groups);
  return (
    <span class="muted facts live">
      {steps > 0 && `${counted(tokens, "token")}, ${tokensPerStep.toFixed(2)} per step`}
    </span>
  );
}

function AnswerTools(props: { message: Message; listed: boolean; toggle: () => void }) {
  const { message } = props;
  const again = async () => {
    await regenerate(message);
    focusOn("#composer");
  };
  const summary = summarise(message.groups);
  return (
    <>
      <button
        type="button"
        class="quiet small"
        disabled={state.busy.value || !state.ready.value}
        onClick={() => void again()}
      >
        Regenerate
      </button>
      {summary.steps > 0 && (
        <button
          type="button"
          class="quiet small"
          aria-pressed={props.listed}
          onClick={props.toggle}
        >
          Step by step
        </button>
      )}
      <span class="muted facts">
        {summary.steps > 0 &&
          `${counted(summary.tokens, "token")}, ${summary.tokensPerStep.toFixed(2)} per step, ${summary.tokensPerSecond.toFixed(1)} per second`}
        {ENDS[message.state] && `${summary.steps ? ", " : ""}${ENDS[message.state]}`}
      </span>
    </>
  );
}

function Versions({ id, all }: { id: number; all: readonly number[] }) {
  if (all.length < 2) return null;
  const index = all.indexOf(id);
  return (
    <span class="versions" role="group" aria-label="Versions">
      <VersionButton to={all[index - 1]} name="Previous version" sign="‹" />
      <span>
        {index + 1}/{all.length}
      </span>
      <VersionButton to={all[index + 1]} name="Next version" sign="›" />
    </span>
  );
}

function VersionButton({ to, name, sign }: { to: number | undefined; name: string; sign: string }) {
  const go = () => {
    const message = to === undefined ? undefined : state.messages.value.get(to);
    if (!message) return;
    void chooseBranch(message);
    // The other version is another article; at the last version this button is disabled.
    requestAnimationFrame(() => {
      const buttons = `#message-${to} .versions button:enabled`;
      const same = `${buttons}[aria-label="${name}"]`;
      focusOn(document.querySelector(same) ? same : buttons);
    });
  };
  return (
    <button
      type="button"
      class="quiet small"
      aria-label={name}
      disabled={state.busy.value || to === undefined}
      onClick={go}
    >
      {sign}
    </button>
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
        dir="auto"
        value={text}
        onInput={(event) => {
          setText(event.currentTarget.value);
          fit(event.currentTarget);
        }}
        onKeyDown={(event) => {
          if (event.key === "Enter" && !event.shiftKey && !isComposing(event)) {
            event.preventDefault();
            void send();
          }
        }}
      />
      <div class="row">
        <button type="submit" class="primary" disabled={!state.ready.value}>
          Send as a new branch
        </button>
        <button type="button" onClick={leaveEditing}>
          Cancel
        </button>
      </div>
    </form>
  );
}
