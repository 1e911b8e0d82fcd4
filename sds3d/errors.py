"""Every failure a user can cause or meet, as one small family of exceptions.

A message says where it happened, what was found, what was expected, and how to fix it. The command line
prints the message without a traceback and leaves with `exit_code`.
"""

import errno

_REFUSED = (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT)  # what a disk may say to anyone


class Sds3dError(Exception):
    """Base of all errors that sds3d raises on purpose; `exit_code` is the process exit status."""

    exit_code = 2


class ConfigError(Sds3dError):
    """A configuration, prompt or command-line value that cannot be used."""


class InputError(Sds3dError):
    """A file, folder or device that is missing, unreadable, damaged or not what it claims to be."""


class CheckpointError(InputError):
    """A checkpoint that is damaged, from another schema version, or does not fit the run."""


class PriorError(Sds3dError):
    """A prior that cannot be found, loaded, or asked for what the run needs."""


class ShapeError(Sds3dError):
    """A tensor whose shape breaks a stated contract (a defect of the caller, not of the user's input)."""

    exit_code = 1


class NonFiniteError(Sds3dError):
    """Non-finite gradients or parameters while `on_nonfinite: raise`, or too many skipped steps in a row."""

    exit_code = 3


class CollapseError(Sds3dError):
    """The scene became empty or fully opaque, so no asset can come out of it."""

    exit_code = 3


class BackendError(Sds3dError):
    """An accelerated backend was asked for but cannot be used here."""


class ExportError(Sds3dError):
    """The scene could not be turned into a mesh or file."""

    exit_code = 4


class NoSurfaceError(ExportError):
    """There is nothing to make a mesh of: the scene has no surface, or the surface no faces."""

    exit_code = 2


def explained(error: BaseException) -> tuple[str, int] | None:
    """(message for the user, exit status) of a failure that a user can cause or meet; None for a defect."""
    if isinstance(error, Sds3dError):
        return str(error), error.exit_code
    if isinstance(error, OSError) and error.errno in _REFUSED:
        return f"{error.filename or 'a file'}: {error.strerror}", 2
    return None
