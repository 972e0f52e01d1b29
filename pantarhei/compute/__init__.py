"""Which part of a network has to run, for this input and this budget."""
