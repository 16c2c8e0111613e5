"""A run's settings: YAML in, typed and frozen settings out, wrong ones refused by name."""
