"""The command line: one thin command a stage; what it does lives in its room.

A command's options are the fields of its config, under the same names as in `config.json` and in Python. Rooms are
imported when their command runs, so that `motley --help` answers at once.
"""

import atexit
import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from itertools import pairwise
from typing import Annotated, Any

from motley import __version__
from motley.errors import CommunicationError, InputError


@dataclasses.dataclass(frozen=True)
class Command:
    """One command: where its function and config live, as "module:name", and what it says to people."""

    summary: str
    function: str
    config: str
    report: str | None = None
    """Turns the result into text; None: the command speaks for itself."""
    after: str | None = None
    """What goes on once the result is printed, with the same config; not with --json, whose reader wants no more."""


COMMANDS: dict[str, Command] = {
    "demo": Command(
        "the whole journey on this machine: train a small model and talk to it",
        "motley.demo.demo:demo", "motley.demo.demo:DemoConfig", "motley.demo.demo:summary",
        "motley.demo.demo:serve_model",
    ),
    "fleet probe": Command(
        "measure this machine (under torchrun: every machine of a job), write a fleet file",
        "motley.fleet.command:fleet_probe", "motley.fleet.command:ProbeConfig", "motley.fleet.command:probe_summary",
    ),
    "fleet show": Command(
        "draw a fleet file",
        "motley.fleet.command:fleet_show", "motley.fleet.command:ShowConfig", "motley.fleet.command:show_summary",
    ),
    "fleet chips": Command(
        "list the chip sheet",
        "motley.fleet.command:fleet_chips", "motley.fleet.command:ChipsConfig", "motley.fleet.command:chips_summary",
    ),
    "plan": Command(
        "what can this fleet train, how fast, at what cost, laid out how",
        "motley.plan.command:plan", "motley.plan.command:PlanConfig", "motley.plan.command:plan_summary",
    ),
    "plan describe": Command(
        "parameters, FLOPs and bytes of a model",
        "motley.plan.command:describe", "motley.plan.command:DescribeConfig", "motley.plan.command:describe_summary",
    ),
    "plan evaluate": Command(
        "predict given layouts and compare with measurements",
        "motley.plan.command:evaluate", "motley.plan.command:EvaluateConfig", "motley.plan.command:evaluate_summary",
    ),
    "plan simulate": Command(
        "replay weeks of training with failures",
        "motley.plan.command:simulate", "motley.plan.command:SimulateConfig", "motley.plan.command:simulate_summary",
    ),
    "data": Command(
        "prepare text: read, clean, deduplicate, tokenize, pack",
        "motley.data.command:data", "motley.data.command:DataCommandConfig", "motley.data.command:summary",
    ),
    "tasks": Command(
        "write verifiable problems with thinking as conversations",
        "motley.data.command:tasks", "motley.data.command:TasksConfig", "motley.data.command:tasks_summary",
    ),
    "pretrain": Command(
        "train a new model on text",
        "motley.train.pretrain:pretrain", "motley.train.config:PretrainConfig", "motley.train.run_folder:summary",
    ),
    "sft": Command(
        "fine-tune a model on conversations",
        "motley.train.sft:sft", "motley.train.config:SftConfig", "motley.train.run_folder:summary",
    ),
    "launch": Command(
        "start a plan on its machines: print the torchrun commands, or run them over ssh",
        "motley.launch.torchrun:launch", "motley.launch.torchrun:LaunchConfig", "motley.launch.torchrun:summary",
    ),
    "launch emulated": Command(
        "play a fleet file on this machine: a worker for each chip, true slow links between them",
        "motley.emulation.launch:launch_emulated", "motley.emulation.launch:EmulatedLaunchConfig",
        "motley.emulation.launch:summary",
    ),
    "eval": Command(
        "bits per byte on text, exact answers on problems",
        "motley.evaluate.command:evaluate", "motley.evaluate.command:EvalConfig", "motley.evaluate.command:summary",
    ),
    "export": Command(
        "write a model for other tools",
        "motley.evaluate.export:export", "motley.evaluate.export:ExportConfig", "motley.evaluate.export:summary",
    ),
    "report": Command(
        "draw a run as one page",
        "motley.evaluate.command:report", "motley.evaluate.command:ReportConfig",
        "motley.evaluate.command:report_summary",
    ),
    "chat": Command("talk to a model in the terminal", "motley.serve.chat:chat", "motley.serve.chat:ChatConfig"),
    "serve": Command("serve a model and its page", "motley.serve.app:serve", "motley.serve.app:ServeConfig"),
}  # fmt: skip


REMOVED = {
    (
        "--emulate-by",
        "priority",
    ): "choose cap (a control group limits CPU time) or wait (sleep after work)",
}
"""Choices that there were once, and what to do instead."""


def usage(group: str = "") -> str:
    """What commands there are; of one group, such as `fleet`, those whose name begins with it."""
    listed = inside(group) if group else list(COMMANDS)
    width = max(map(len, listed))
    lines = [
        f"motley {__version__}: your own DeepSeek, on the chips you have",
        "",
        f"usage: motley {group} COMMAND [OPTIONS]" if group else "usage: motley COMMAND [OPTIONS]",
        "",
    ]
    lines += [f"  {name:<{width}}  {COMMANDS[name].summary}" for name in listed]
    return "\n".join([*lines, "", f"motley {listed[0] if group else 'COMMAND'} --help tells a command's options."])


def inside(group: str) -> list[str]:
    """Names of the commands in a group: `fleet` → `fleet probe`, `fleet show`, ..."""
    return [name for name in COMMANDS if name.startswith(f"{group} ")]


def find(path: str) -> Any:
    """The object that "module:name" names."""
    module, name = path.split(":")
    return getattr(import_module(module), name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command: the entry point of `motley` and `python -m motley`.

    arguments: None: those of this process.

    Returns the exit status: 0, 1 when other ranks exited, 2 for what the user can mend, 130 when stopped.
    """
    words, status = sys.argv[1:] if arguments is None else arguments, 0
    name = " ".join(words[:2]) if " ".join(words[:2]) in COMMANDS else "".join(words[:1])
    try:
        if (command := COMMANDS.get(name)) is None:
            status = answer(words)
        else:
            refuse_removed(words)
            config, as_json = parse(name, command, words[len(name.split()) :])
            result = find(entry(name, command, config))(config, **emulation_for(config))
            if command.report is not None and result is not None:
                print(json.dumps(result, ensure_ascii=False) if as_json else find(command.report)(result))
            if command.after is not None and not as_json:
                find(command.after)(config)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except (InputError, CommunicationError, OSError, KeyboardInterrupt) as error:
        status = tell(name, error)
    if arguments is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _end(status)
    return status


def answer(words: Sequence[str]) -> int:
    """Usage, the version, or what is wrong with a command; returns the exit status."""
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    if words[0] == "--version":
        print(__version__)
        return 0
    group = inside(words[0])
    if group and (len(words) == 1 or words[1] in ("-h", "--help")):
        print(usage(words[0]))
        return 2 if len(words) == 1 else 0
    there_are = f"choose one of {', '.join(group)}" if group else f"there are {', '.join(COMMANDS)}"
    print(f"motley: there is no command {' '.join(words[:2])!r}; {there_are}", file=sys.stderr)
    return 2


def tell(name: str, error: BaseException) -> int:
    """Say in one sentence why a command failed; returns the exit status."""
    if isinstance(error, KeyboardInterrupt):
        print(f"\nmotley {name}: {error or 'stopped'}", file=sys.stderr)
        return 130
    if isinstance(error, OSError):  # what no stage foresaw: a folder without permission, a disk that is gone
        where = f"{error.filename}: " if error.filename else ""
        print(f"motley {name}: {where}{error.strerror or error}", file=sys.stderr)
        return 2
    print(f"motley {name}: {error}", file=sys.stderr)
    return 1 if isinstance(error, CommunicationError) else 2


def entry(name: str, command: Command, config: Any) -> str:
    """The function that runs a command: a training stage is one process's own, or that of many ranks."""
    return f"motley.parallel.run:{name}" if getattr(config, "needs_ranks", False) else command.function


def refuse_removed(arguments: Sequence[str]) -> None:
    """Raises InputError for a choice that there was once."""
    for (option, choice), instead in REMOVED.items():
        if f"{option}={choice}" in arguments or (option, choice) in pairwise(arguments):
            raise InputError(f"{option} {choice} was removed; {instead}")


def emulation_for(config: Any) -> dict[str, Any]:
    """The emulated fleet that a training stage asks for, as an argument; only this file knows both rooms."""
    if not getattr(config, "emulate", ""):
        return {}
    return {"emulation": find("motley.emulation.apply:EmulatedFleet").asked_by(config)}


def parse(name: str, command: Command, arguments: Sequence[str]) -> tuple[Any, bool]:
    """(config, whether --json was asked for); leaves with status 2 when an option is wrong, as tyro does."""
    import tyro

    config = find(command.config)
    groups: dict[str, Any] = getattr(config, "GROUPS", {"": config})
    fields: list[Any] = []
    for title, group in groups.items():
        shown = group(**{one.name: config.defaults()[one.name] for one in dataclasses.fields(group)}) if title else None
        kind = group if title else Annotated[group, tyro.conf.arg(name="")]
        fields.append((title or "first", kind, *([dataclasses.field(default=shown)] if title else [])))
    if command.report is not None:
        on = Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help="Print the result as one JSON object.")]
        fields.append(("json", on, dataclasses.field(default=False)))
    options = dataclasses.make_dataclass("Options", fields)
    beside = f" Beside it: motley {', motley '.join(group)}." if (group := inside(name)) else ""
    description = f"{command.summary.capitalize()}.{beside}"
    arguments = _with_new_names(name, arguments, getattr(config, "RENAMED", {}))
    chosen = tyro.cli(
        options, args=arguments, prog=f"motley {name}", description=description, config=(tyro.conf.OmitArgPrefixes,)
    )
    if groups == {"": config}:
        made = chosen.first
    else:
        parts = [getattr(chosen, title or "first") for title in groups]
        made = config(**{one.name: getattr(part, one.name) for part in parts for one in dataclasses.fields(part)})
    return made, getattr(chosen, "json", False)


def _with_new_names(name: str, arguments: Sequence[str], renamed: Mapping[str, str]) -> list[str]:
    """Options by the names that they have now; says so where an old one was given."""
    found = []
    for word in arguments:
        option, equals, value = word.partition("=")
        new = renamed.get(option.removeprefix("--").replace("-", "_")) if option.startswith("--") else None
        if new is not None:
            now = f"--{new.replace('_', '-')}"
            print(f"motley {name}: {option} is called {now} now", file=sys.stderr)
            word = f"{now}{equals}{value}"
        found.append(word)
    return found


def _end(status: int) -> None:
    """End one of many ranks at once, after what is to be done at exit.

    Now and then a thread of gloo still winds up while the interpreter takes itself apart, and ends a process whose work
    is done with "terminate called without an active exception" (PyTorch 2.13).
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
