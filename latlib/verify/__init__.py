"""Whether a run, or what was published of it, is still what was written: `python -m
latlib.verify`."""
