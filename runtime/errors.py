"""Errors that the user can mend, and the line that reports them."""

import sys

from runtime.memory import out_of_memory


class UserError(ValueError):
    """The input is at fault, not the program: the message names the value, the rule and the way out."""

    printed_by_main = False  # True if rank 0 raises it too and prints it for all ranks


class LostPeer(UserError):
    """A message of this rank failed, because another rank has ended or cannot be reached."""


def explain(error, memory_hint=None):
    """Return one line for the user about an exception that is no bug of ours, or None if it is one.

    Not bugs: `UserError`, files that cannot be used (an OSError that nobody else handled), too little memory, and
    compilers that fail.
    memory_hint: what to pass if memory runs out.
    """
    # An error of a data loading process holds a traceback: its last line is the error.
    last = str(error).strip().rpartition("\n")[2]
    if isinstance(error, UserError):
        text = str(error).rpartition("UserError: ")[2]
    elif out_of_memory(error):
        text = f"out of memory{f': pass {memory_hint}' if memory_hint else ''}"
    elif isinstance(error, OSError):
        name = error.filename or "a file, or the output"
        text = f"{name} cannot be used: {error.strerror or last}; check that it exists, its permissions and the space"
    elif isinstance(error, RuntimeError) and last.startswith("DataLoader worker"):
        text = "a data loading process was killed, perhaps for lack of memory: pass a smaller --num-workers"
    elif isinstance(error, RuntimeError) and last.startswith("Pin memory thread"):
        text = "the thread that pins memory has ended, perhaps for lack of memory: pass a smaller --num-workers"
    elif (compiler := sys.modules.get("torch._dynamo.exc")) and isinstance(error, compiler.BackendCompilerFailed):
        lines = [line for line in str(error).splitlines() if line.strip() and not line.endswith("raised:")]
        reason = next((line for line in lines if " error: " in line), (lines or [type(error).__name__])[0])
        text = f"--compile has failed ({reason}): leave it out"
    else:
        return None
    return " ".join(text.split())


def first_line(error):
    """Return the first line of an exception's text, or the name of its class if the text is empty."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
