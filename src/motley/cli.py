"""The command line: one thin command a stage."""


def main() -> None:
    raise SystemExit("under construction")
