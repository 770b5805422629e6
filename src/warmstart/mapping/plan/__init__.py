"""The plan: decisions as data, to look at, to lock and to undo."""
