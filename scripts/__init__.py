"""Further commands, each of which stands alone: none imports another."""
