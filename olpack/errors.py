"""The one exception that a user is meant to see, and one line of any other."""

from __future__ import annotations

from olpack.printable import redacted


class OlpackError(Exception):
    """What is wrong, and the command or setting that fixes it.

    Raised where the cause is known, printed once by the command line (exit code 1), never with a traceback unless `--debug`.

    Secrets of the environment and the user information of URLs are taken out of it, because an error also goes into records and reports.

    Args:
        problem: one sentence that names the thing and the place: "recipe.yaml, line 4: unknown key 'quant'".
        remedy: one sentence with what to do: "Did you mean 'quants'?" Empty where the problem contains it.
    """

    def __init__(self, problem: str, remedy: str = ""):
        # Together, because the remedy may repeat what the problem has in a URL.
        self.problem, _, self.remedy = redacted(f"{problem}\x1e{remedy}").partition("\x1e")
        super().__init__(f"{self.problem} {self.remedy}".strip())


def first_line(error: BaseException) -> str:
    """What a library's error says, on one line; of one without a message its form."""
    return (str(error).strip() or repr(error)).splitlines()[0]
