"""The decoding loop: token ids in, token ids out."""
