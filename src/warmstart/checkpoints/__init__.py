"""Read: one room per format, all lazy."""
