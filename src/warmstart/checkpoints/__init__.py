"""Where weights come from: one room per file format, all lazy, none of them ever executes anything."""
