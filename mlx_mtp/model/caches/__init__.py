"""What layers remember: keys and values, alone, in a batch, cut into blocks."""
