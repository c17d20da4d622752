"""The commands: one thin file each. ``common.run`` holds what they share: parsing, exit codes, the last JSON line."""
