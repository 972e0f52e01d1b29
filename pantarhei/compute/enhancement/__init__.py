"""Enhancement of compressed pictures of unknown quality with a network that stops early (RBQE)."""
