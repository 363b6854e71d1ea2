import { useState } from "preact/hooks";

import { describeStep, describeToken } from "../steps";
import type { Group } from "../types";

/** An answer as a list of its steps; the arrow keys move between them. */
export function StepList({ groups, name }: { groups: readonly Group[]; name: string }) {
  const [selected, setSelected] = useState(0);
  const current = Math.min(selected, groups.length - 1);
  const move = (event: KeyboardEvent) => {
    const target = {
      ArrowRight: current + 1,
      ArrowLeft: current - 1,
      Home: 0,
      End: groups.length - 1,
    }[event.key];
    if (target === undefined) return;
    event.preventDefault();
    setSelected(Math.max(0, Math.min(groups.length - 1, target)));
  };
  return (
    <div class="steps">
      <div
        class="text plain step-text"
        tabIndex={0}
        role="listbox"
        aria-label="Steps of this answer; use the arrow keys to move between them"
        aria-activedescendant={`step-${name}`}
        onKeyDown={move}
      >
        {groups.map((group, index) => (
          <span
            key={index}
            id={index === current ? `step-${name}` : undefined}
            role="option"
            aria-selected={index === current}
            aria-label={describeStep(groups, index)}
            class={kind(group, index)}
            onMouseEnter={() => setSelected(index)}
          >
            {group.tokens.map((token, place) => (
              <span key={place} class={place < group.accepted ? "accepted" : "own"}>
                {token}
              </span>
            ))}
          </span>
        ))}
      </div>
      <div class="step-facts" aria-live="polite">
        <p>{describeStep(groups, current)}.</p>
        <p class="muted">
          {groups[current]!.tokens.map((token, place) => (
            <span key={place} class="token-fact">
              <code>{JSON.stringify(token)}</code> {describeToken(groups[current]!, place)}
            </span>
          ))}
        </p>
      </div>
    </div>
  );
}

function kind(group: Group, index: number): string {
  if (group.tokens.length < 2) return "step one";
  return index % 2 ? "step odd" : "step even";
}
