"""Notebooks through papermill, in order, with signals handled: what `run_all.sh` calls."""
