import type { VNode } from "preact";
import { useEffect, useMemo, useRef, useState } from "preact/hooks";

import { attempt } from "../actions";
import * as state from "../state";
import type { Message } from "../types";
import { Empty } from "./Empty";
import { MessageView } from "./MessageView";

const NEAR_PX = 80;

/** The messages of the branch that is shown. */
export function Thread() {
  const box = useRef<HTMLDivElement>(null);
  const [atEnd, toEnd, onScroll] = useFollowing(box);
  const view = useViews();
  return (
    <div class="thread-box">
      <div
        class="thread"
        ref={box}
        tabIndex={0}
        role="region"
        aria-label="Messages"
        onScroll={onScroll}
        onClick={(event) => void attempt(() => copyCode(event))}
      >
        <div>
          {state.shown.value.map(view)}
          {!state.shown.value.length && <Empty />}
        </div>
      </div>
      {!atEnd && (
        <button type="button" class="small to-end" onClick={toEnd}>
          Scroll to bottom
        </button>
      )}
    </div>
  );
}

/** Views of messages; unchanged messages reuse their view, so that long threads stay fast. */
function useViews(): (message: Message) => VNode {
  return useMemo(() => {
    const cache = new WeakMap<Message, { key: string; view: VNode }>();
    return (message) => {
      const versions = state.versions.value.get(message.parent) ?? [];
      const key = versions.join();
      let entry = cache.get(message);
      if (entry?.key !== key) {
        const view = <MessageView key={message.id} message={message} versions={versions} />;
        entry = { key, view };
        cache.set(message, entry);
      }
      return entry.view;
    };
  }, []);
}

/** Scroll with a growing answer, unless the user has scrolled away. */
function useFollowing(box: { current: HTMLDivElement | null }) {
  const follows = useRef(true);
  const [atEnd, setAtEnd] = useState(true);
  const toEnd = () => {
    follows.current = true;
    box.current?.scrollTo({ top: box.current.scrollHeight });
  };
  // Another conversation is shown from its end, and so is a new answer.
  const view = `${state.conversation.value?.id} ${state.busy.value}`;
  useEffect(toEnd, [view]);
  useEffect(() => {
    const observer = new ResizeObserver(() => follows.current && toEnd());
    observer.observe(box.current!);
    observer.observe(box.current!.firstElementChild!);
    return () => observer.disconnect();
  }, []);
  const onScroll = () => {
    const { scrollHeight, scrollTop, clientHeight } = box.current!;
    follows.current = scrollHeight - scrollTop - clientHeight < NEAR_PX;
    setAtEnd(follows.current);
  };
  return [atEnd, toEnd, onScroll] as const;
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
