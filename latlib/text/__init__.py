"""Pure functions of text: encodings, chat templates, near-duplicates."""
