"""Run the command `probe`, also as python -m probe: ready for Ctrl-C before any slow import."""

from probe import stopping


def main() -> None:
    stopping.begin()
    from probe.cli import main

    main()


if __name__ == "__main__":
    main()
