"""What a run needs in bytes, hours and money, before anything is downloaded: `--check`."""
