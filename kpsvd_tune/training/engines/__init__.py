"""What moves the weights of one training: an engine for each way to share the work."""
