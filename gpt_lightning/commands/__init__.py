"""The commands that do not import Lightning, a module each."""
