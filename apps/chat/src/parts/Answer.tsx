import { useEffect, useLayoutEffect, useMemo, useRef, useState } from "preact/hooks";

import { ready, typeset } from "../formulas";
import { Marks, canMark } from "../marks";
import { renderBlocks, renderPlain } from "../markdown";
import { splitReasoning } from "../reasoning";
import { settings } from "../state";
import { describeStep, describeToken, indexAt, stepEnds } from "../steps";
import type { Group, Message } from "../types";

interface Tip {
  text: string;
  x: number;
  y: number;
}

/** An answer as rendered Markdown, with its steps underlined. */
export function Answer({ message }: { message: Message }) {
  const whole = useRef<HTMLDivElement>(null);
  const root = useRef<HTMLDivElement>(null);
  const marks = useMemo(() => new Marks(), []);
  const [tip, setTip] = useState<Tip | null>(null);
  const streaming = message.state === "streaming";
  const parts = useMemo(() => splitReasoning(message), [message.text, message.groups]);
  const reasoning = useMemo(() => renderPlain(parts.reasoning, streaming), [parts.reasoning, streaming]);
  const blocks = useMemo(() => renderBlocks(parts.content, streaming), [parts.content, streaming]);
  const marked = canMark && settings.value.marks && message.groups.length > 0;
  useLayoutEffect(() => typeset(whole.current!), [reasoning, blocks, ready.value]);
  useEffect(() => {
    if (marked && root.current) marks.show(root.current, message.text, message.groups, parts.from);
    else marks.clear();
  }, [blocks, message.groups, marked, ready.value]);
  useEffect(() => () => marks.clear(), []);
  const point = (event: MouseEvent) => {
    const offset = marked ? marks.offsetAt(event.clientX, event.clientY) : null;
    const text = offset === null ? "" : describeAt(message.groups, offset);
    setTip(text ? { text, x: event.clientX, y: event.clientY } : null);
  };
  return (
    <div ref={whole} onMouseMove={point} onMouseLeave={() => setTip(null)}>
      {(parts.reasoning || parts.open) && (
        <details class="reasoning">
          <summary>{parts.open && streaming ? "Reasoning …" : "Reasoning"}</summary>
          <div class="reasoning-text">
            <Blocks all={reasoning} />
          </div>
        </details>
      )}
      <div class="text" ref={root}>
        <Blocks all={blocks} />
      </div>
      {tip && <Tooltip tip={tip} />}
    </div>
  );
}

function Blocks({ all }: { all: readonly string[] }) {
  return all.map((html, index) => <div key={index} dangerouslySetInnerHTML={{ __html: html }} />);
}

function Tooltip({ tip }: { tip: Tip }) {
  const right = tip.x > innerWidth - 340;
  return (
    <div
      class={right ? "tip right" : "tip"}
      role="tooltip"
      ref={(box) => {
        // Set as properties, because the policy forbids style attributes.
        if (box) {
          box.style.left = `${tip.x}px`;
          box.style.top = `${tip.y + 18}px`;
        }
      }}
    >
      {tip.text}
    </div>
  );
}

function describeAt(groups: readonly Group[], offset: number): string {
  const ends = stepEnds(groups);
  const step = indexAt(ends, offset);
  const group = groups[step];
  if (!group) return "";
  const start = step ? ends[step - 1]! : 0;
  const tokens = group.tokens.reduce<number[]>(
    (sums, token) => [...sums, (sums.at(-1) ?? 0) + token.length],
    [],
  );
  const token = indexAt(tokens, offset - start);
  const shown = JSON.stringify(group.tokens[token] ?? "");
  return `${describeStep(groups, step)}\n${shown}: ${describeToken(group, token)}`;
}
