"""What a row costs on this machine: measured, stored and corrected."""
