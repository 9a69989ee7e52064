"""One file a command: its options and the order of its stages."""
