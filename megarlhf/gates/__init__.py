"""Numbers that a correct run keeps within bounds."""
