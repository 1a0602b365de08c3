"""Errors that a user can act on: each message says what is wrong and what to do about it."""


class RouterError(Exception):
    """Base of every error that router-ml raises on purpose; the command line prints it and exits with 2."""


class InputError(RouterError, ValueError):
    """A file, an option or a request is not of the form it has to be."""


class UnreachableError(InputError):
    """A database server does not answer; it may later."""


class BundleError(RouterError):
    """A bundle is incomplete, altered or made by an incompatible version."""


class RegistryError(RouterError):
    """The model registry is unreachable or does not hold what was asked for."""


class NoAliasError(RegistryError):
    """The registry answers, and the model has no such alias."""


class NotRegisteredError(RegistryError):
    """The registry answers, and knows no such model."""


class MovedError(RegistryError):
    """The champion is another version than the one that was expected."""


class NoWayBackError(RegistryError):
    """The registry answers, and knows no version to roll back to."""


class NoEligibleModelError(RouterError):
    """No candidate satisfies the request's hard constraints; `excluded` says why, per model."""

    def __init__(self, message: str, excluded: dict[str, str]) -> None:
        super().__init__(message)
        self.excluded = excluded
