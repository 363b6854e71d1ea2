import { useState } from "preact/hooks";

import { describeStep, describeToken } from "../steps";
import type { Group } from "../types";

/** An answer as it was made, step by step; arrow keys go through the steps. */
export function StepList({ groups, name }: { groups: readonly Group[]; name: string }) {
  const [at, setAt] = useState(0);
  const current = Math.min(at, groups.length - 1);
  const move = (event: KeyboardEvent) => {
    const to = {
      ArrowRight: current + 1,
      ArrowLeft: current - 1,
      Home: 0,
      End: groups.length - 1,
    }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    setAt(Math.max(0, Math.min(groups.length - 1, to)));
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
            onMouseEnter={() => setAt(index)}
          >
            {group.tokens.map((token, place) => (
              <span key={place} class={place < group.accepted ? "held" : "own"}>
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
