"""The one exception that a user is meant to see."""


class OlpackError(Exception):
    """What is wrong, and the command or setting that fixes it.

    Raised where the cause is known, printed once by the command line (exit code 1), never with a traceback unless `--debug`.

    Args:
        problem: one sentence that names the thing and the place: "recipe.yaml, line 4: unknown key 'quant'".
        remedy: one sentence with what to do: "Did you mean 'quants'?" Empty where the problem contains it.
    """

    def __init__(self, problem: str, remedy: str = ""):
        super().__init__(f"{problem} {remedy}".strip())
        self.problem = problem
        self.remedy = remedy
