"""From the command line to an exit code: one line for what a user got wrong, a traceback for what we did.

Exit codes: 2 a wrong config or unreadable data, 3 a run that diverged, 130 Ctrl-C, 143 SIGTERM.
Imports nothing heavy.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from mmformer.run.config import CONFIG_ERRORS, dotted_keys, one_line
from mmformer.run.folder import FolderError


class UserError(Exception):
    """Something that the user can mend, said in one line."""


def launch(main: Callable[..., object]) -> int:
    """Run a Hydra main function and turn what it raises into an exit code; HYDRA_FULL_ERROR=1 shows every traceback."""
    full = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # or Hydra prints errors its own way and exits before we see them
    sys.stderr = sys.stderr if full else _Without(sys.stderr, "Error executing job with overrides")
    try:
        main()
        return 0
    except KeyboardInterrupt:
        return 130
    except (*CONFIG_ERRORS, FolderError, UserError) as error:
        if full:
            raise
        return _say(error, 2)
    except Exception as error:
        name = type(error).__name__
        if name == "Interrupted":
            return int(error.exit_code)  # pyright: ignore[reportAttributeAccessIssue]
        code = {"NonFiniteLoss": 3, "BadDataError": 2, "CheckpointError": 2, "FrozenError": 2}.get(name)
        if full or code is None:
            raise
        return _say(error, code)


class _Without:
    """A stream without the lines that start in one way: Hydra writes one before an error, whatever is set."""

    def __init__(self, stream: TextIO, start: str) -> None:
        self._stream, self._start = stream, start

    def write(self, text: str) -> int:
        return len(text) if text.startswith(self._start) else self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _say(error: BaseException, code: int) -> int:
    line = one_line(error, _known_keys()) if isinstance(error, CONFIG_ERRORS) else str(error)
    print(f"error: {line}", file=sys.stderr)
    return code


def _known_keys() -> list[str]:
    """The keys of the config without overrides of values: what a misspelt one is compared with."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    folder = Path(sys.argv[0]).resolve().parent / "configs"
    if not folder.is_dir():
        return []
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(folder), version_base="1.3"):
        for overrides in ([o for o in sys.argv[1:] if _is_choice(o)], []):
            try:
                return list(dotted_keys(compose("train", overrides)))
            except CONFIG_ERRORS:
                continue
    return []


def _is_choice(override: str) -> bool:
    return "=" in override and "." not in override.split("=")[0] and not override.startswith(("-", "+", "~"))


def named_keys() -> list[str]:
    """The dotted keys that the command line of this run names."""
    return [word.split("=")[0].lstrip("+~") for word in sys.argv[1:] if "=" in word]


def command(*changes: str) -> str:
    """The command line of this run with some overrides added or replaced."""
    keys = {change.split("=")[0] for change in changes}
    kept = [word for word in sys.argv[1:] if word.split("=")[0] not in keys]
    return shlex.join(["python", Path(sys.argv[0]).name, *kept, *changes])
