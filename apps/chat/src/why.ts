/** Explains the speed on this machine from measurements and statistics. */

import type { StepSummary } from "./steps";
import type { Costs, Facts, ModelInfo, Options } from "./types";
import { counted } from "./words";

const MIN_STEPS = 8;

/** Sentences that explain what limits the speed, the most important first. */
export function reasons(
  model: ModelInfo,
  facts: Facts,
  options: Options,
  summary: StepSummary,
): string[] {
  const sentences: string[] = [];
  if (model.drafters.every((drafter) => drafter === "lookup")) {
    sentences.push(
      model.drafters.length
        ? "This model can only look up draft tokens in the text. An adapter proposes more: train one with mlx-mtp train."
        : "Nothing proposes draft tokens, so every step generates one token.",
    );
  }
  if (options.layout === "plain" || options.num_draft_tokens === 0) {
    sentences.push("Drafting is turned off in the settings of this conversation.");
  }
  if (facts.blas === "reference" && facts.runs_on === "cpu") {
    sentences.push("MLX multiplies matrices with its reference BLAS. OpenBLAS is several times faster.");
  }
  if (summary.steps >= MIN_STEPS) sentences.push(...fromSteps(summary, facts.costs, options));
  else sentences.push("Not enough steps yet to estimate acceptance.");
  if (model.adapter) sentences.push(...fromCosts(facts));
  return sentences;
}

function fromSteps(summary: StepSummary, costs: Costs, options: Options): string[] {
  const sentences = [
    `The average is ${summary.tokensPerStep.toFixed(2)} tokens per step over ${summary.steps} steps.`,
  ];
  const first = summary.positions[0];
  if (first?.verified) {
    const share = percent(first.accepted / first.verified);
    sentences.push(`The first draft token was accepted in ${share} of the steps that verified it.`);
  }
  if (summary.plainShare > 0.2) {
    sentences.push(
      `${percent(summary.plainShare)} of the steps drafted nothing because the planner expected drafts to cost more time than they save.`,
    );
  }
  if ((options.temp ?? 0) > 0.3) {
    sentences.push("Sampling at a higher temperature lowers acceptance because the model is less certain of the next token.");
  }
  const rows = Math.round(summary.drafted / Math.max(summary.steps, 1)) + 1;
  const ratio = costRatio(costs, rows);
  if (ratio !== null && rows > 1) {
    sentences.push(
      `Verifying ${counted(rows - 1, "draft")} takes ${timesAs(ratio)} a plain step, not counting mask tokens.`,
    );
  }
  return sentences;
}

function fromCosts(facts: Facts): string[] {
  if (!facts.measured) return ["Row costs have not been measured on this machine. Measure them with mlx-mtp tune."];
  const drafting = facts.costs.draft_ms.at(-1) ?? 0;
  const plain = facts.costs.forward_ms[0]?.[0] ?? 0;
  const sentences: string[] = [];
  for (const rows of [4, 8]) {
    const ratio = costRatio(facts.costs, rows);
    if (ratio !== null) sentences.push(`A step of ${rows} rows takes ${timesAs(ratio)} a step of 1 row.`);
  }
  if (plain > 0 && drafting > 0) {
    sentences.push(`Drafting adds up to ${drafting.toFixed(1)} ms to a step; a plain step takes ${plain.toFixed(1)} ms.`);
  }
  return sentences;
}

/** Time of a step of ``rows`` rows relative to one row, in a short context; null if unknown. */
export function costRatio(costs: Costs, rows: number): number | null {
  const times = costs.forward_ms[0];
  const index = costs.rows.findIndex((count) => count >= rows);
  if (!times || index < 0 || !times[0] || costs.rows[0] !== 1) return null;
  if (costs.rows[index] === rows || index === 0) return times[index]! / times[0];
  const [low, high] = [costs.rows[index - 1]!, costs.rows[index]!];
  const share = (rows - low) / (high - low);
  return (times[index - 1]! + share * (times[index]! - times[index - 1]!)) / times[0];
}

// Noise can make a measured cost of several rows lower than that of one row.
function timesAs(ratio: number): string {
  return ratio > 1 ? `about ${ratio.toFixed(2)} times as long as` : "no longer than";
}

export function percent(share: number): string {
  return `${Math.round(100 * share)}%`;
}
