"""The command line: `ernie5 VERB ...` or `python -m ernie5 VERB ...`. Importing it does not import torch."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import os
import sys
import traceback
from collections.abc import Sequence

from ernie5.errors import EXIT_DONE, EXIT_USER

@dataclasses.dataclass(frozen=True)
class Verb:
    """One verb: how it is called, what it does, and the `module:function(argv) -> exit code` behind it."""

    usage: str
    summary: str
    target: str


VERBS = {
    "train": Verb("train CONFIG [a.b=c ...]", "pretrain a model, or resume its run", "ernie5.train.command:main"),
    "tokenizer": Verb("tokenizer train CONFIG", "train a text, visual or audio tokenizer",
                      "ernie5.train.codec_command:main"),
    "data": Verb("data build|inspect ...", "turn your files into shards; look into shards", "ernie5.data.command:main"),
    "generate": Verb("generate CKPT --prompt TEXT --to text|image|video|audio --out FILE",
                     "write, draw, film or speak", "ernie5.generate.command:main"),
    "evaluate": Verb("evaluate CKPT --data SHARDS [--json]", "losses and the figures of 'it learns', with baselines",
                     "ernie5.evaluate.command:main"),
    "describe": Verb("describe CONFIG [--json]", "print the resolved config with docs and parameter counts (no torch)",
                     "ernie5.train.describe_command:main"),
    "report": Verb("report RUN_DIR", "write RUN_DIR/report.html", "ernie5.evaluate.report_command:main"),
    "inspect": Verb("inspect CKPT", "print what a checkpoint holds", "ernie5.checkpoint.command:main"),
    "verify": Verb("verify CKPT", "compare a checkpoint with its checksums; names damaged files and tensors",
                   "ernie5.checkpoint.verify:main"),
    "reshard": Verb("reshard SRC DST [--files N | --layout AXES]", "write a checkpoint in other files",
                    "ernie5.checkpoint.reshard_command:main"),
    "convert": Verb("convert SRC DST --to FORMAT", "carry a model to ERNIE 4.5's formats and back",
                    "ernie5.checkpoint.convert.command:main"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the process exit code (ernie5/errors.py lists them).

    Errors that a user can act on become one line on stderr; anything else is a bug and keeps its traceback, which
    the verbs that have a run directory also save there (observe/faults.py: `keep_tracebacks`).
    """
    _open_streams()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(help_text())
        return EXIT_DONE if arguments else EXIT_USER
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(f"ernie5 {version('ernie5')}")
        return EXIT_DONE
    if arguments[0] not in VERBS:
        print(_unknown_verb(arguments[0]), file=sys.stderr)
        return EXIT_USER
    return _run(arguments[0], arguments[1:])


def help_text() -> str:
    """The text of `ernie5 --help`."""
    lines = ["usage: ernie5 VERB ...   (every verb explains itself: ernie5 VERB --help)", ""]
    for verb in VERBS.values():
        lines += [f"  ernie5 {verb.usage}", f"      {verb.summary}"]
    lines += [
        "",
        "Settings come from YAML files (configs/); any of them can be overridden at the end: train.steps=100",
        "exit codes: 0 done, 1 bug, 2 your input, 3 machine, 4 numerics, 5 lost peer, 75 interrupted (resumable)",
    ]
    return "\n".join(lines)


def _open_streams() -> None:
    """Streams that take every text. Where the caller closed stdout or stderr (`2>&-`), Python has none, and the next
    file that is opened would take its number and receive what libraries print."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")
    if isinstance(sys.stdout, io.TextIOWrapper):  # what a terminal cannot show ends no verb; stderr is so by default
        sys.stdout.reconfigure(errors="backslashreplace")


def _let_threads_sleep() -> None:
    """Before torch loads OpenMP: its threads spin for milliseconds after each parallel region by default, which starves
    whoever shares the cores; ten thousand turns (some 10 us) bridge the gap between two operators (kernels/README.md).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def _run(verb: str, arguments: list[str]) -> int:
    _let_threads_sleep()
    module, function = VERBS[verb].target.split(":")
    try:
        return vars(importlib.import_module(module))[function](arguments)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else EXIT_DONE if stop.code is None else EXIT_USER
    except BrokenPipeError:
        sys.stderr.close()  # whoever read our output is gone (`| head`): nothing to say, and no one to say it to
        return EXIT_DONE
    except (Exception, KeyboardInterrupt) as error:
        return _explain(error)


def _explain(error: BaseException) -> int:
    from ernie5.observe.faults import classify

    fault = classify(error)
    with contextlib.suppress(BrokenPipeError):  # the code tells it, too
        if fault.is_bug:
            traceback.print_exception(error)
        else:
            print(fault.line(), file=sys.stderr, flush=True)
    return fault.exit_code


def _unknown_verb(name: str) -> str:
    import difflib

    close = difflib.get_close_matches(name, list(VERBS), n=1)
    advice = f"Did you mean `ernie5 {close[0]}`?" if close else f"Verbs: {', '.join(VERBS)}."
    return f"ernie5: there is no verb {name!r}. {advice} (ernie5 --help)"


if __name__ == "__main__":
    sys.exit(main())
