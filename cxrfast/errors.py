"""The errors that a command turns into an exit code (DESIGN: Commands)."""


class InputError(ValueError):
    """The user's input or options are wrong. One sentence: what was found and what to do. Exit code 2."""


class ResourceError(RuntimeError):
    """Disk or memory ran out. Nothing is lost; the same command goes on. Exit code 3."""
