"""From a row to token ids and labels: its form, its messages, the template, the checks on both."""
