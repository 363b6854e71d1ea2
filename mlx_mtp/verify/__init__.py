"""Proof that speculative output equals plain output, on this machine, for this model.

Greedy: every prompt is decoded plainly once, by stock mlx-lm once (if wanted), and then by every
layout and depth; the ids must be the same.  Where a run parts from a reference, the reference's
logits tell a near-tie from a mismatch (``near_tie``); after a near-tie the run starts again behind
the reference's token, so that one tie does not hide what follows it.
Sampled: the first tokens are tested against the exact distribution (``sampling_check``).
"""
