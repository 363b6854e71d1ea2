"""Proof that speculative output equals plain output, for a model on this machine.

Greedy: every prompt is decoded once by plain decoding, once by stock mlx-lm (unless turned off),
and then with every layout and depth; the ids must be the same.  Where a run diverges from a
reference, the reference's logits decide between a near-tie and a mismatch (``near_tie``).  After a
near-tie the run is continued after the reference's token, so that one tie does not hide later
divergences.  Sampled: the first tokens are tested against the exact distribution (``sampling``).
"""
