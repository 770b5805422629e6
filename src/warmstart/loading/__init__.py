"""Write: preflight, place, verify by value."""
