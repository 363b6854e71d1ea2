import { useRef, useState } from "preact/hooks";

import {
  attempt,
  download,
  listConversations,
  newConversation,
  openConversation,
  remember,
  remove,
  rename,
  takeIn,
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
  const found = state.summaries.value;
  const named = (each: Summary) => {
    setRenaming(null);
    focusOn(`[data-conversation="${each.id}"]`);
  };
  return (
    <nav class="conversations" aria-label="History">
      {!found.length && <p class="muted">{state.search.value ? "No conversations found" : "No conversations yet"}</p>}
      {byAge(found).map(([age, several]) => (
        <section key={age} aria-label={age} onKeyDown={moveInList}>
          <h2>{age}</h2>
          <ul>
            {several.map((each) => (
              <li key={each.id} class={each.id === state.conversation.value?.id ? "current" : ""}>
                {renaming === each.id ? (
                  <Rename summary={each} done={() => named(each)} />
                ) : (
                  <Item
                    summary={each}
                    rename={() => setRenaming(each.id)}
                    remove={() => setDeleting(each)}
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
          // The key that is called delete on a Mac.
          if (event.key === "Delete" || event.key === "Backspace") props.remove();
        }}
      >
        <span class="name">{name}</span>
        {snippet && <span class="snippet">{snippet}</span>}
      </button>
      <span class="row-tools">
        <Tool sign="✎" name={`Rename ${name}`} go={props.rename} />
        <Tool sign="✕" name={`Delete ${name}`} go={props.remove} />
      </span>
    </>
  );
}

function Tool({ sign, name, go }: { sign: string; name: string; go: () => void }) {
  return (
    <button type="button" class="quiet small" aria-label={name} title={name} onClick={go}>
      {sign}
    </button>
  );
}

function Rename({ summary, done }: { summary: Summary; done: () => void }) {
  const leave = (event: { currentTarget: HTMLInputElement }) => {
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
      onBlur={leave}
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
          if (chosen) void takeIn(chosen);
        }}
      />
    </footer>
  );
}

function moveInList(event: KeyboardEvent): void {
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (!step || !(event.target instanceof HTMLButtonElement)) return;
  const items = [...document.querySelectorAll<HTMLElement>(".conversations button.open")];
  const at = items.indexOf(event.target);
  if (at < 0) return;
  event.preventDefault();
  const next = items[at + step];
  if (next) next.focus();
  else if (step < 0) focusOn("#search");
}
