"""Research scripts; nothing imports them and the wheel leaves them out."""
