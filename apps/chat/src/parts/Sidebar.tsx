import { useRef, useState } from "preact/hooks";

import {
  attempt,
  download,
  importFile,
  listConversations,
  newConversation,
  openConversation,
  remember,
  remove,
  rename,
} from "../actions";
import * as state from "../state";
import type { Summary } from "../types";
import { Dialog } from "./Dialog";
import { byAge } from "../ages";
import { focusOn, isComposing } from "./shortcuts";

const TYPING_MS = 150;
let typing = 0;

/** The list of conversations. */
export function Sidebar() {
  return (
    <aside id="sidebar" class="sidebar" aria-label="Conversations">
      <div class="sidebar-head">
        <button
          type="button"
          class="primary wide"
          onClick={() => {
            newConversation();
            focusOn("#composer");
          }}
        >
          New conversation
        </button>
        <Search />
      </div>
      <List />
      <Footer />
    </aside>
  );
}

function Search() {
  return (
    <input
      id="search"
      type="search"
      placeholder="Search"
      aria-label="Search conversations"
      value={state.search.value}
      onInput={(event) => {
        state.search.value = event.currentTarget.value;
        clearTimeout(typing);
        typing = window.setTimeout(() => void attempt(listConversations), TYPING_MS);
      }}
      onKeyDown={(event) => {
        if (event.key === "ArrowDown") {
          event.preventDefault();
          focusOn(".conversations button.open");
        }
      }}
    />
  );
}

function List() {
  const [renaming, setRenaming] = useState<number | null>(null);
  const [deleting, setDeleting] = useState<Summary | null>(null);
  const summaries = state.summaries.value;
  const endRenaming = (summary: Summary) => {
    setRenaming(null);
    focusOn(`[data-conversation="${summary.id}"]`);
  };
  return (
    <nav class="conversations" aria-label="History">
      {!summaries.length && <p class="muted">{state.search.value ? "No conversations found" : "No conversations yet"}</p>}
      {byAge(summaries).map(([age, group]) => (
        <section key={age} aria-label={age} onKeyDown={moveInList}>
          <h2>{age}</h2>
          <ul>
            {group.map((summary) => (
              <li key={summary.id} class={summary.id === state.conversation.value?.id ? "current" : ""}>
                {renaming === summary.id ? (
                  <Rename summary={summary} done={() => endRenaming(summary)} />
                ) : (
                  <Item
                    summary={summary}
                    rename={() => setRenaming(summary.id)}
                    remove={() => setDeleting(summary)}
                  />
                )}
              </li>
            ))}
          </ul>
        </section>
      ))}
      {deleting && <Delete summary={deleting} close={() => setDeleting(null)} />}
    </nav>
  );
}

function Item(props: { summary: Summary; rename: () => void; remove: () => void }) {
  const { id, title, snippet } = props.summary;
  const name = title || "Untitled";
  return (
    <>
      <button
        type="button"
        class="open"
        data-conversation={id}
        title={name}
        aria-current={id === state.conversation.value?.id ? "page" : undefined}
        onClick={() => void attempt(() => openConversation(id))}
        onKeyDown={(event) => {
          if (event.key === "F2") props.rename();
          // A Mac's Delete key is Backspace.
          if (event.key === "Delete" || event.key === "Backspace") props.remove();
        }}
      >
        <span class="name">{name}</span>
        {snippet && <span class="snippet">{snippet}</span>}
      </button>
      <span class="row-tools">
        <Tool sign="✎" name={`Rename ${name}`} run={props.rename} />
        <Tool sign="✕" name={`Delete ${name}`} run={props.remove} />
      </span>
    </>
  );
}

function Tool({ sign, name, run }: { sign: string; name: string; run: () => void }) {
  return (
    <button type="button" class="quiet small" aria-label={name} title={name} onClick={run}>
      {sign}
    </button>
  );
}

function Rename({ summary, done }: { summary: Summary; done: () => void }) {
  const save = (event: { currentTarget: HTMLInputElement }) => {
    const title = event.currentTarget.value.trim();
    if (title && title !== summary.title) void rename(summary.id, title);
    done();
  };
  return (
    <input
      ref={(input) => input?.focus()}
      onFocus={(event) => event.currentTarget.select()}
      aria-label="Title"
      maxLength={200}
      defaultValue={summary.title}
      onBlur={save}
      onKeyDown={(event) => {
        if (isComposing(event)) return;
        if (event.key === "Enter") event.currentTarget.blur();
        if (event.key === "Escape") {
          event.stopPropagation();
          event.currentTarget.value = summary.title;
          event.currentTarget.blur();
        }
      }}
    />
  );
}

function Delete({ summary, close }: { summary: Summary; close: () => void }) {
  return (
    <Dialog title="Delete this conversation?" close={close}>
      <p>“{summary.title || "Untitled"}” and all its branches will be deleted. This cannot be undone.</p>
      <div class="row">
        <button
          type="button"
          class="danger"
          onClick={() => {
            close();
            void remove(summary.id);
            focusOn("#search");
          }}
        >
          Delete
        </button>
        <button type="button" onClick={close}>
          Cancel
        </button>
      </div>
    </Dialog>
  );
}

function Footer() {
  const file = useRef<HTMLInputElement>(null);
  return (
    <footer class="sidebar-foot">
      <button type="button" class="quiet small" onClick={() => file.current?.click()}>
        Import
      </button>
      <button type="button" class="quiet small" onClick={() => download(null, "json")}>
        Export all
      </button>
      <button type="button" class="quiet small" onClick={() => (state.helping.value = true)}>
        Shortcuts
      </button>
      <select
        class="quiet small"
        aria-label="Theme"
        value={state.settings.value.theme}
        onChange={(event) => void remember({ theme: event.currentTarget.value as state.Theme })}
      >
        <option value="system">System theme</option>
        <option value="light">Light theme</option>
        <option value="dark">Dark theme</option>
      </select>
      <input
        ref={file}
        type="file"
        accept=".json,application/json"
        hidden
        onChange={(event) => {
          const chosen = event.currentTarget.files?.[0];
          event.currentTarget.value = "";
          if (chosen) void importFile(chosen);
        }}
      />
    </footer>
  );
}

function moveInList(event: KeyboardEvent): void {
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (!step || !(event.target instanceof HTMLButtonElement)) return;
  const items = [...document.querySelectorAll<HTMLElement>(".conversations button.open")];
  const index = items.indexOf(event.target);
  if (index < 0) return;
  event.preventDefault();
  const next = items[index + step];
  if (next) next.focus();
  else if (step < 0) focusOn("#search");
}
