"""Files that are whole or absent, the hub, this machine, and progress."""
